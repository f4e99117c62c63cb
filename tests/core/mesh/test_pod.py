"""Several processes as one run: they compute what one does, and stop and continue together."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from experiment_cases import record, write_experiment
from recover_cases import metrics_of
from repository import HANG, WORKERS

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.weight_files import read_header
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.prune import score
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.pruning import make_plan, prune_folder

# --- two processes ---------------------------------------------------------------------------------------------------

SECTIONS = {
    "data": {"fraction": 0.8},
    "score": {"samples": 8, "batch_size": 8},
    "prune": {"ratio": 0.2},
    "recover": {
        "trainable": "lora", "control": False, "batch_size": 16, "accumulation": 2, "steps": 20, "save_every": 10,
        "log_every": 1, "eps": 1e-3, "learning_rate": 1e-2, "losses": {"ce": 0.5, "l2": 0.5},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0},
    },
    "mesh": {"data": 4, "fsdp": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, goldens):
    root = tmp_path_factory.mktemp("pod")
    words = ["a dog", "one", "two", "red", "a cat at night", "blue", "green"]
    records = [record(f"r{i}", f"img{i % 4}.png", f"Is it {words[i % 7]}?", words[i % 7]) for i in range(30)]
    write_experiment(root, goldens, records, **SECTIONS)
    return root


def start(root: Path, workdir: str, commands: str, count: int, *flags: str) -> list[subprocess.Popen]:
    """`count` processes with 8 devices between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    devices = f"--xla_force_host_platform_device_count={8 // count}"
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}"}
    place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"] if count > 1 else []
    script, processes = str(WORKERS / "pod_worker.py"), []
    for number in range(count):
        ids, log = root / f"{workdir}-{number}.ids", root / f"{workdir}-{number}.log"
        command = [sys.executable, script, str(ids), commands, f"--config={root / 'experiment.yaml'}", "--debug"]
        command += [f"--workdir={root / workdir}", *place, *([f"--process_id={number}"] if place else []), *flags]
        with log.open("a") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return processes


def finish(root: Path, workdir: str, *args: str) -> None:
    for number, process in enumerate(start(root, workdir, *args)):
        assert process.wait(timeout=HANG) == 0, (root / f"{workdir}-{number}.log").read_text()[-3000:]


def ids(root: Path, workdir: str, number: int) -> list[list[str]]:
    return [json.loads(line) for line in (root / f"{workdir}-{number}.ids").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(experiment):
    """The workdir of one process of eight devices that scored, pruned and recovered."""
    finish(experiment, "one", "score,prune,recover", 1)
    return experiment / "one"


def assert_same_training(ours: Path, theirs: Path) -> None:
    """20 steps with the same losses and gradients, and the same parameters in the end, within 1e-5."""
    found = [metrics_of(workdir / "training") for workdir in (ours, theirs)]
    assert [line["step"] for line in found[0]] == list(range(1, 21))
    for name in ("step", "loss", "ce", "l2", "grad_norm"):
        np.testing.assert_allclose(*([line[name] for line in run] for run in found), rtol=1e-5, atol=0)
    assert found[0][0]["loss"] > found[0][-1]["loss"]  # it did train
    assert largest_difference(ours, theirs) <= 1e-5


@pytest.mark.slow
def test_two_processes_of_four_devices_train_what_one_of_eight_does(experiment, one):
    """Scores, plan, losses and parameters; and joined, their rows are the global batches in the same order."""
    finish(experiment, "two", "score,prune,recover,export", 2)
    two = experiment / "two"
    assert json.loads((one / "plan.json").read_text()) == json.loads((two / "plan.json").read_text())
    assert_same_training(two, one)
    whole = [left + right for left, right in zip(ids(experiment, "two", 0), ids(experiment, "two", 1), strict=True)]
    assert ids(experiment, "one", 0) == whole
    assert len({name for batch in whole for name in batch}) == 24  # 80 % of 30
    assert not (experiment / "two-1.log").read_text().count("recover ...")  # only process 0 talks
    written = [set((experiment / f"two-{number}.ids.written").read_text().splitlines()) for number in (0, 1)]
    assert {"scores.npz", "plan.json", "export"} <= written[0]
    assert all(path.startswith("training/checkpoints/") for path in written[1]), sorted(written[1])


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_and_one_continues_on_another_mesh(experiment, one):
    """Both save after the same step; one process then goes through the same batches to the same end within 1e-5."""
    moved = experiment / "moved"
    shutil.copytree(one, moved, ignore=shutil.ignore_patterns("training", "recovered", "recover.json"))
    processes = start(experiment, "moved", "recover", 2)
    metrics = moved / "training/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert processes[0].poll() is None, (experiment / "moved-0.log").read_text()[-3000:]
        time.sleep(0.05)
    processes[1].terminate()
    assert [process.wait(timeout=HANG) for process in processes] == [143, 143]
    told = [(experiment / f"moved-{number}.log").read_text().splitlines()[-1] for number in (0, 1)]
    assert told[0] == told[1]
    step = int(re.match(r"vlmprune: training stopped on SIGTERM after step (\d+) of 20; saved in ", told[0])[1])
    assert max(int(path.name) for path in (moved / "training/checkpoints").iterdir()) == step < 20
    joined = [
        left + right for left, right in zip(ids(experiment, "moved", 0), ids(experiment, "moved", 1), strict=True)
    ]
    finish(experiment, "moved", "recover", 1, "--config.mesh.data=2", "--config.mesh.tensor=2")
    assert joined + ids(experiment, "moved", 0)[step:] == ids(experiment, "one", 0)
    assert_same_training(moved, one)
    assert json.loads((moved / ".stages/recover.json").read_text())["facts"]["resumed_from"] == step


@pytest.mark.slow
def test_sigterm_to_one_process_ends_the_scoring_of_both(experiment):
    """The notice takes a second to go round, less than the first batch takes to compile."""
    flags = ("--config.score.samples=24", "--config.data.fraction=1.0")
    processes, log = start(experiment, "scoring", "score", 2, *flags), experiment / "scoring-0.log"
    while "score ..." not in log.read_text():
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[0].terminate()
    assert [process.wait(timeout=HANG) for process in processes] == [143, 143]
    lines = [(experiment / f"scoring-{number}.log").read_text().splitlines()[-1] for number in (0, 1)]
    assert lines[0] == lines[1]
    assert re.match(r"vlmprune: score \(block_influence\) stopped on SIGTERM after \d of 3; ", lines[0])
    finish(experiment, "scoring", "score", 2, *flags)
    assert {path.name for path in (experiment / "scoring").iterdir()} == {".stages", "scores.npz"}


@pytest.mark.slow
def test_all_processes_end_when_one_finds_the_input_wrong(experiment):
    processes = start(experiment, "wrong", "prune", 2)
    assert [process.wait(timeout=HANG) for process in processes] == [2, 2]
    assert "run `vlmprune score` (or `vlmprune run`) first" in (experiment / "wrong-1.log").read_text()


@pytest.mark.slow
def test_both_end_when_one_cannot_read_an_image(experiment, pruned, goldens):
    """In the second step, in which the other one goes on to a collective."""
    (experiment / "images").mkdir()
    shutil.copy(goldens / "data/images/img0.png", experiment / "images/good.png")
    (experiment / "images/broken.png").write_bytes(b"no image")
    places = {int(number): place for place, number in enumerate(grain.MapDataset.range(64).shuffle(seed=42))}
    lines = [entry(f"r{n}", f"{'broken' if places[n] == 30 else 'good'}.png", "Yes.") for n in range(64)]
    record = next(number for number, place in places.items() if place == 30)
    (experiment / "unreadable.jsonl").write_text("\n".join(lines))
    pruned("unreadable")
    flags = [f"--config.data.train={experiment / 'unreadable.jsonl'}", *RECOVER]
    flags.append(f"--config.data.images={experiment / 'images'}")
    processes, log = start(experiment, "unreadable", "recover", 2, *flags), experiment / "unreadable-1.log"
    while f"record r{record}" not in log.read_text():
        assert None in [process.poll() for process in processes]
        time.sleep(0.05)
    assert [process.wait(timeout=HANG) for process in processes] == [2, 2]
    told = [(experiment / f"unreadable-{number}.log").read_text().splitlines() for number in (0, 1)]
    told = [[line.removeprefix("vlmprune: error: ") for line in log if line.startswith("vlmprune: ")] for log in told]
    assert f"record r{record}" in told[1][0]
    assert told == [[f"process 1 failed: {told[1][0]}"], [told[1][0]]]


REPAIR = (
    "--config.score.depth=greedy_loss", "--config.score.width=l2", "--config.score.samples=24",
    "--config.score.options={'solved': True, 'search': 1}", "--config.prune.method=hybrid",
    "--config.prune.layers_removed=1", "--config.data.fraction=1.0", "--config.reconstruct.method=least_squares",
    "--config.reconstruct.samples=24", "--config.reconstruct.batch_size=8", "--config.export.quantize=w8a16",
    "--config.export.rounding=gptq", "--config.recover.method=none",
)  # fmt: skip
REPAIRS = "score,prune,reconstruct,export"


def files_of(workdir: Path) -> dict[str, bytes]:
    names = ("scores.npz", "plan.json", "reconstructed/model.safetensors", "export/model.safetensors")
    return {name: (workdir / name).read_bytes() for name in names}


@pytest.mark.slow
def test_one_two_and_four_processes_repair_and_round_the_same(experiment):
    """Greedy search, reconstruction and GPTQ: equal plans and codes, weights within 1e-5; killed runs end the same."""
    for count in (1, 2, 4):
        finish(experiment, f"repair{count}", REPAIRS, count, *REPAIR)
    one, two, four = (experiment / f"repair{count}" for count in (1, 2, 4))
    plan = json.loads((one / "plan.json").read_text())
    for other in (two, four):
        assert json.loads((other / "plan.json").read_text()) == plan
        assert largest_difference(one, other, "reconstructed") <= 1e-5
        rounded = [Checkpoint(workdir / "export").tensors for workdir in (one, other)]
        codes = [(rounded[0][key].array(), rounded[1][key].array()) for key in rounded[0] if key.endswith("_packed")]
        assert codes
        assert np.mean([np.mean(a == b) for a, b in codes]) > 0.99
    report = json.loads((two / ".stages/reconstruct.json").read_text())["facts"]["modules"]
    assert any(module["ridge"] is not None for module in report)

    killed, journals = experiment / "killed", (".scores.npz.parts", ".reconstructed.parts", ".calibrated.parts")
    for journal in journals:  # the same run, killed in each of its long stages
        processes = start(experiment, killed.name, REPAIRS, 2, *REPAIR)
        while len(list(killed.glob(f"{journal}/*.safetensors"))) < 2:
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.002)
        for process in processes[::-1]:
            process.kill()
            process.wait()
    finish(experiment, killed.name, REPAIRS, 2, *REPAIR)
    assert files_of(killed) == files_of(two)
    assert not [path for journal in journals for path in killed.glob(journal)]


# --- what the processes are handed ------------------------------------------------------------------------------------

RECOVER = ("--config.data.fraction=1.0", "--config.recover.steps=4", "--config.recover.save_every=4")


@pytest.fixture(scope="module")
def pruned(experiment):
    """Callable (workdir): gives it a pruned model, so that `recover` can run there."""
    teacher = experiment / "teacher"
    model = load(teacher)
    plan = make_plan(score(model, None, criterion="l2"), model.cfg, method="width", ratio=0.1)
    prune_folder(teacher, plan, experiment / "pruned", dtype="float32")

    def give(workdir: str) -> None:
        (experiment / workdir).mkdir()
        shutil.copytree(experiment / "pruned", experiment / workdir / "pruned")
        (experiment / workdir / "plan.json").write_text(plan.to_json())

    return give


def entry(name: str, image: str | None, answer: str) -> str:
    return json.dumps(record(name, image, "Is it so?", answer))


def largest_difference(ours: Path, theirs: Path, name: str = "recovered") -> float:
    """Largest difference of two workdirs' models."""
    first, second = (flatten(load(workdir / name).params) for workdir in (ours, theirs))
    assert first.keys() == second.keys()
    return max(float(np.abs(np.asarray(first[path]) - np.asarray(second[path])).max()) for path in first)


def one_and_two(
    experiment: Path, pruned, name: str, lines: list[str], *flags: str, cache: str, counts: tuple[int, ...], term: str
) -> list[list[list[str]]]:
    """Train on the records with one process and with two; equal losses, `term` among them, and parameters.

    The setting `cache` is a folder of its own, NAME-COUNT, for every count of processes in `counts`.

    Returns the ids that each process was handed.
    """
    (experiment / f"{name}.jsonl").write_text("\n".join(lines))
    losses = []
    for count in (1, 2):
        pruned(f"{name}{count}")
        train = f"--config.data.train={experiment / name}.jsonl"
        cached = [f"--config.{cache}={experiment / f'{name}-{count}'}"] if count in counts else []
        finish(experiment, f"{name}{count}", "recover", count, train, *RECOVER, *flags, *cached)
        metrics = metrics_of(experiment / f"{name}{count}" / "training")
        losses.append([[line[key] for key in ("loss", "ce", term, "grad_norm")] for line in metrics])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, atol=0)
    assert largest_difference(*(experiment / f"{name}{count}" for count in (1, 2))) <= 1e-5
    found = [ids(experiment, f"{name}1", 0), *(ids(experiment, f"{name}2", number) for number in range(2))]
    assert found[0] == [left + right for left, right in zip(*found[1:], strict=True)]
    return found


@pytest.mark.slow
def test_text_on_one_process_images_on_the_other_and_a_cached_teacher(experiment, pruned):
    """Two processes compute and read of a teacher what one does, each a shard of its own rows, one of them skipped."""
    places = {int(number): place for place, number in enumerate(grain.MapDataset.range(64).shuffle(seed=42))}
    lines = []
    for number in range(64):
        image = None if places[number] % 16 < 8 else f"img{number % 4}.png"
        lines.append(entry(f"{'text' if image is None else 'image'}{number}", image, "Yes. " * (1 + number % 5)))
    skipped = next(number for number, place in places.items() if place == 27)
    lines[skipped] = entry("missing", "none.png", "Yes.")
    flags = ["--config.data.on_error=skip", "--config.recover.losses.l2=0.0", "--config.recover.losses.kl=0.5"]
    flags.append("--config.recover.losses.teacher_inputs=own")
    _, first, second = one_and_two(
        experiment, pruned, "mixed", lines, *flags, cache="recover.teacher_cache", counts=(1, 2), term="kl"
    )
    assert all(name.startswith("text") for batch in first for name in batch)
    assert all(name.startswith("image") for batch in second for name in batch if name)
    assert [name for batch in second for name in batch].count("") == 1
    folders = [experiment / f"mixed-{count}" for count in (1, 2)]
    made = [ArrayCache(folder, json.loads((folder / "cache.json").read_text())) for folder in folders]
    assert len(list(folders[1].glob("*.safetensors"))) == 2 * len(list(folders[0].glob("*.safetensors"))) == 2
    keys = {key for file in folders[0].glob("*.safetensors") for key in read_header(file)}
    assert len(keys) == 2 * 63
    for key in keys:
        np.testing.assert_allclose(made[1][key], made[0][key], atol=1e-4)


@pytest.mark.slow
def test_groups_buckets_skipped_records_and_a_shared_feature_cache(experiment, pruned, goldens):
    """Of two processes each writes the shards of its own images; one process has the tower."""
    answers = ["Yes.", "It is a red car. " * 3, "It is 10:45. " * 8]
    (experiment / "many").mkdir()
    for n in range(16):
        shutil.copy(goldens / f"data/images/img{n % 4}.png", experiment / f"many/{n}.png")
    lines = [entry(f"r{n}", f"{n % 16}.png" if n % 3 else None, answers[n % 7 % 3]) for n in range(58)]
    lines[5:5] = [entry("missing", "none.png", "Yes."), '{"id": "broken"', entry("late", None, "<image>")]
    lines[30:30] = [entry("long", None, "It is 10:45. " * 40), '{"id": "empty"}', entry("also missing", "a.png", "No.")]
    buckets = ("--config.data.length_buckets=(64, 128, 256)", "--config.data.truncate=False")
    buckets += (f"--config.data.images={experiment / 'many'}",)
    grouped = ("--config.data.group_by=modality_length", "--config.data.on_error=skip")
    shared = {"cache": "data.feature_cache", "counts": (2,), "term": "l2"}
    whole, *_ = one_and_two(experiment, pruned, "ragged", lines, *buckets, *grouped, **shared)
    assert len(list((experiment / "ragged-2").glob("*.safetensors"))) == 2
    assert sorted(name for batch in whole for name in batch if name) == sorted(f"r{n}" for n in range(58))
    listed = []
    for count in (1, 2):
        files = [experiment / f"ragged{count}/training/skipped-{number}.jsonl" for number in range(count)]
        listed.append([json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()])
    assert sorted(line["record"] for line in listed[0]) == ["6", "also missing", "empty", "late", "long", "missing"]
    assert sorted(map(str, listed[0])) == sorted(map(str, listed[1]))
    log = (experiment / "ragged2-0.log").read_text()
    assert "6 rows skipped, listed in" in log
    assert sum(line["empty_rows"] for line in metrics_of(experiment / "ragged2/training")) == 6


@pytest.mark.slow
def test_two_processes_answer_what_one_does_and_open_their_own_images(experiment, pruned, goldens):
    """Each prepares the images of its rows: of 16 images in two batches, each half."""
    (experiment / "shown").mkdir()
    for number in range(16):
        shutil.copy(goldens / f"data/images/img{number % 4}.png", experiment / f"shown/{number}.png")
    lines = [entry(f"r{n}", f"{n}.png", "Yes.") for n in range(16)]
    (experiment / "asked.jsonl").write_text("\n".join(lines))
    flags = [f"--config.data.eval={experiment / 'asked.jsonl'}", f"--config.data.eval_images={experiment / 'shown'}"]
    flags += ["--config.recover.method=none", "--config.evaluate.batch_size=8", "--config.evaluate.max_new_tokens=4"]
    for count in (1, 2):
        pruned(f"asked{count}")
        finish(experiment, f"asked{count}", "evaluate", count, *flags)
    first, second = ((experiment / f"asked{count}/eval/pruned.answers.jsonl").read_text() for count in (1, 2))
    assert first == second
    opened = [set((experiment / f"asked2-{n}.ids.images").read_text().split()) for n in (0, 1)]
    assert [len(names) for names in opened] == [8, 8]
    assert opened[0].isdisjoint(opened[1])


@pytest.mark.slow
def test_no_usable_record_stops_every_process(experiment, pruned):
    (experiment / "gone.jsonl").write_text("\n".join(entry(f"r{n}", "none.png", "Yes.") for n in range(20)))
    pruned("gone")
    flags = [f"--config.data.train={experiment / 'gone.jsonl'}", *RECOVER, "--config.data.on_error=skip"]
    assert [process.wait(timeout=HANG) for process in start(experiment, "gone", "recover", 2, *flags)] == [2, 2]
    words = "none of the 20 records is usable (the first:"
    assert all(words in (experiment / f"gone-{number}.log").read_text() for number in range(2))
