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
from vlmprune_jax.core.recovery import loop
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.pruning import make_plan, prune_folder
from vlmprune_jax.run.cli.main import main

# --- two processes ---------------------------------------------------------------------------------------------------

SECTIONS = {
    "data": {"fraction": 0.8},
    "score": {"samples": 24, "batch_size": 8},
    "prune": {"ratio": 0.2},
    "recover": {
        "trainable": "lora", "control": False, "batch_size": 16, "accumulation": 2, "steps": 20, "save_every": 5,
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


def start(root: Path, workdir: str, commands: str, *flags: str, count: int = 2) -> list[subprocess.Popen]:
    """`count` processes with 8 devices between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    devices = f"--xla_force_host_platform_device_count={8 // count}"
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}"}
    script, processes = str(WORKERS / "pod_worker.py"), []
    for number in range(count):
        ids = root / f"{workdir}-{number}.ids"
        command = [sys.executable, script, str(ids), commands, f"--config={root / 'experiment.yaml'}", "--debug"]
        command += [f"--workdir={root / workdir}", f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
        command += [f"--process_id={number}", *flags]
        with (root / f"{workdir}-{number}.log").open("a") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return processes


def wait_for(processes: list[subprocess.Popen], root: Path, workdir: str, code: int) -> list[str]:
    """Wait until all processes have ended with this exit code; return the last line that each of them printed."""
    logs = [root / f"{workdir}-{number}.log" for number in range(len(processes))]
    codes = [process.wait(timeout=HANG) for process in processes]
    assert codes == [code] * len(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    return [log.read_text().splitlines()[-1] for log in logs]


def kill(processes: list[subprocess.Popen]) -> None:
    for process in processes[::-1]:
        process.kill()
        process.wait()


def finish(root: Path, workdir: str, *args: str) -> None:
    wait_for(start(root, workdir, *args), root, workdir, 0)


def alone(root: Path, workdir: str, commands: str, *flags: str) -> list[list[str]]:
    """Run commands in this process, which has 8 devices; return the record ids of the training steps."""
    handed, original = [], loop._next

    def listed(*args):
        batch = original(*args)
        handed.append([*batch.record_ids])
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_next", listed)
        for command in commands.split(","):
            assert main([command, f"--config={root / 'experiment.yaml'}", f"--workdir={root / workdir}", *flags]) == 0
    return handed


def ids(root: Path, workdir: str) -> list[list[str]]:
    """Return the record ids of each training step of two processes, those of process 0 first."""
    files = [root / f"{workdir}-{number}.ids" for number in (0, 1)]
    handed = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [left + right for left, right in zip(*handed, strict=True)]


def assert_same_training(ours: Path, theirs: Path) -> None:
    """20 steps with the same losses and gradients, and the same parameters in the end, within 1e-5."""
    found = [metrics_of(workdir / "training") for workdir in (ours, theirs)]
    assert [line["step"] for line in found[0]] == list(range(1, 21))
    for name in ("step", "loss", "ce", "l2", "grad_norm"):
        np.testing.assert_allclose(*([line[name] for line in run] for run in found), rtol=1e-5, atol=0)
    assert found[0][0]["loss"] > found[0][-1]["loss"]  # it did train
    assert largest_difference(ours, theirs) <= 1e-5


@pytest.mark.slow
def test_runs_stop_together_and_continue_as_fewer_processes_to_the_same_end(experiment):
    """Four processes stop scoring, two go on and are killed in a save, two stop training, one ends it on another mesh.

    The notice of a SIGTERM takes a second to go round, less than the first batch takes to compile.
    """
    batches = alone(experiment, "one", "score,prune,recover")
    assert len({name for batch in batches for name in batch}) == 24  # 80 % of 30
    one, moved, log = experiment / "one", experiment / "moved", experiment / "moved-0.log"
    processes = start(experiment, "moved", "score", count=4)
    while "score ..." not in log.read_text():
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[0].terminate()
    told = wait_for(processes, experiment, "moved", 143)
    assert {*told} == {told[0]}
    assert re.match(r"vlmprune: score \(block_influence\) stopped on SIGTERM after \d of 3; ", told[0])

    processes = start(experiment, "moved", "score,prune,recover")
    while not [*moved.glob("training/checkpoints/*.orbax-checkpoint-tmp*")]:
        assert [process.poll() for process in processes] == [None, None], log.read_text()[-3000:]
        time.sleep(0.002)
    kill(processes)
    handed = [experiment / f"moved-{number}.ids" for number in (0, 1)]
    for file in handed:
        file.unlink()

    processes = start(experiment, "moved", "recover")
    while not handed[0].exists() or handed[0].read_text().count("\n") < 3:
        assert processes[0].poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    processes[1].terminate()
    told = wait_for(processes, experiment, "moved", 143)
    assert told[0] == told[1]
    step = int(re.match(r"vlmprune: training stopped on SIGTERM after step (\d+) of 20; saved in ", told[0])[1])
    assert max(int(path.name) for path in (moved / "training/checkpoints").iterdir()) == step < 20
    assert json.loads((one / "plan.json").read_text()) == json.loads((moved / "plan.json").read_text())
    assert not [*moved.glob("*.journal")]
    assert not (experiment / "moved-1.log").read_text().count("recover ...")  # only process 0 talks
    written = (experiment / "moved-1.ids.written").read_text().splitlines()
    assert all(path.startswith("training/checkpoints/") for path in written), sorted(written)

    rest = alone(experiment, "moved", "recover", "--config.mesh.data=2", "--config.mesh.tensor=2")
    rest = ids(experiment, "moved") + rest
    assert rest in [batches[saved:] for saved in (0, 5, 10, 15)]
    assert_same_training(moved, one)
    assert json.loads((moved / ".stages/recover.json").read_text())["facts"]["resumed_from"] == step


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
    wait_for(start(experiment, "unreadable", "recover", *flags), experiment, "unreadable", 2)
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
def test_two_processes_repair_and_round_as_one_and_killed_ones_to_the_same_bytes(experiment):
    """Greedy search, reconstruction and GPTQ: equal plans and codes, weights within 1e-5."""
    alone(experiment, "repair1", REPAIRS, *REPAIR)
    finish(experiment, "repair2", REPAIRS, *REPAIR)
    one, two = experiment / "repair1", experiment / "repair2"
    assert json.loads((two / "plan.json").read_text()) == json.loads((one / "plan.json").read_text())
    assert largest_difference(one, two, "reconstructed") <= 1e-5
    rounded = [Checkpoint(workdir / "export").tensors for workdir in (one, two)]
    codes = [(rounded[0][key].array(), rounded[1][key].array()) for key in rounded[0] if key.endswith("_packed")]
    assert codes
    assert np.mean([np.mean(a == b) for a, b in codes]) > 0.99
    report = json.loads((two / ".stages/reconstruct.json").read_text())["facts"]["modules"]
    assert any(module["ridge"] is not None for module in report)
    written = [(experiment / f"repair2-{number}.ids.written").read_text().splitlines() for number in (0, 1)]
    assert {"scores.npz", "plan.json", "export"} <= {*written[0]}
    assert all(".parts" in path for path in written[1]), sorted(written[1])

    killed, journals = experiment / "killed", (".scores.npz.parts", ".reconstructed.parts", ".calibrated.parts")
    for journal in journals:  # the same run, killed in each of its long stages
        processes = start(experiment, killed.name, REPAIRS, *REPAIR)
        while len(list(killed.glob(f"{journal}/*.safetensors"))) < 2:
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.002)
        kill(processes)
    finish(experiment, killed.name, REPAIRS, *REPAIR)
    for name in ("scores.npz", "plan.json", "reconstructed/model.safetensors", "export/model.safetensors"):
        assert (killed / name).read_bytes() == (two / name).read_bytes(), name
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
    experiment: Path, pruned, name: str, lines: list[str], commands: str, *flags: str, cache: str, counts=(1, 2), term
) -> list[list[str]]:
    """Train on the records with one process and with two; equal losses, `term` among them, batches and parameters.

    The setting `cache` is a folder of its own, NAME-COUNT, for every count of processes in `counts`.
    Returns the ids of the batches.
    """
    file = experiment / f"{name}.jsonl"
    file.write_text("\n".join(lines))
    losses = []
    for count, command in ((1, alone), (2, finish)):
        pruned(f"{name}{count}")
        settings = [f"--config.data.train={file}", *RECOVER, *flags]
        settings += [f"--config.{cache}={experiment / name}-{count}"] * (count in counts)
        batches = command(experiment, f"{name}{count}", commands, *settings) or ids(experiment, f"{name}2")
        lines = metrics_of(experiment / f"{name}{count}" / "training")
        losses.append((batches, [[line[key] for key in ("loss", "ce", term, "grad_norm")] for line in lines]))
    assert len(losses[0][1]) == 4
    assert losses[0][0] == losses[1][0]
    np.testing.assert_allclose(losses[1][1], losses[0][1], rtol=1e-5, atol=0)
    assert largest_difference(*(experiment / f"{name}{count}" for count in (1, 2))) <= 1e-5
    return losses[0][0]


@pytest.mark.slow
def test_text_on_one_process_images_on_the_other_and_a_cached_teacher(experiment, pruned, goldens):
    """Two processes compute and read of a teacher what one does, each a shard of its own rows, one of them skipped.

    They then answer what one does, each with the images of its rows: of 16 images in two batches, each half.
    """
    places = {int(number): place for place, number in enumerate(grain.MapDataset.range(64).shuffle(seed=42))}
    lines = []
    for number in range(64):
        image = None if places[number] % 16 < 8 else f"img{number % 4}.png"
        lines.append(entry(f"{'text' if image is None else 'image'}{number}", image, "Yes. " * (1 + number % 5)))
    skipped = next(number for number, place in places.items() if place == 27)
    lines[skipped] = entry("missing", "none.png", "Yes.")
    (experiment / "shown").mkdir()
    for number in range(16):
        shutil.copy(goldens / f"data/images/img{number % 4}.png", experiment / f"shown/{number}.png")
    (experiment / "asked.jsonl").write_text("\n".join(entry(f"r{n}", f"{n}.png", "Yes.") for n in range(16)))
    flags = ["data.on_error=skip", "recover.losses.l2=0.0", "recover.losses.kl=0.5", "evaluate.max_new_tokens=4"]
    flags += ["recover.losses.teacher_inputs=own", f"data.eval={experiment / 'asked.jsonl'}"]
    flags += [f"data.eval_images={experiment / 'shown'}", "evaluate.batch_size=8"]
    flags, cache = [f"--config.{flag}" for flag in flags], "recover.teacher_cache"
    batches = one_and_two(experiment, pruned, "mixed", lines, "recover,evaluate", *flags, cache=cache, term="kl")
    assert all(name.startswith("text") for batch in batches for name in batch[:8])
    assert all(name.startswith("image") for batch in batches for name in batch[8:] if name)
    assert [name for batch in batches for name in batch[8:]].count("") == 1
    folders = [experiment / f"mixed-{count}" for count in (1, 2)]
    made = [ArrayCache(folder, json.loads((folder / "cache.json").read_text())) for folder in folders]
    assert len(list(folders[1].glob("*.safetensors"))) == 2 * len(list(folders[0].glob("*.safetensors"))) == 2
    keys = {key for file in folders[0].glob("*.safetensors") for key in read_header(file)}
    assert len(keys) == 2 * 63
    for key in keys:
        np.testing.assert_allclose(made[1][key], made[0][key], atol=1e-4)
    first, second = ((experiment / f"mixed{count}/eval/pruned.answers.jsonl").read_text() for count in (1, 2))
    assert first == second
    opened = [{*(experiment / f"mixed2-{n}.ids.images").read_text().split()} for n in (0, 1)]
    opened = [{name for name in names if name[0].isdigit()} for names in opened]
    assert [len(names) for names in opened] == [8, 8]
    assert opened[0].isdisjoint(opened[1])


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
    whole = one_and_two(experiment, pruned, "ragged", lines, "recover", *buckets, *grouped, **shared)
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
