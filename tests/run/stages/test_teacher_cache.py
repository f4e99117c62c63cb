"""Recovery with the teacher's top-k logits on disk: the losses of a teacher that runs, computed once, continued."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
from experiment_cases import write_experiment

from vlmprune_jax.base import cache
from vlmprune_jax.base.atomic import check_space
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.prune import score
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data import record_cache
from vlmprune_jax.io.data.cached_arrays import TeacherRows
from vlmprune_jax.io.data.images import ImageLoader
from vlmprune_jax.io.exports.pruning import make_plan, prune_folder
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.stages.work import Work

VOCAB = 416
ONE_STEP = "--config.recover.steps=1"


def record(number: int, answer: str, *, image: bool = True, turns: int = 1, name: str | None = None) -> dict:
    """With its image or text alone, of one turn or several."""
    talk = []
    for turn in range(turns):
        mark = "<image>\n" if image and turn == 0 else ""
        talk += [{"from": "human", "value": f"{mark}Is it {turn}?"}, {"from": "gpt", "value": answer}]
    shown = {"image": name or f"img{number % 4}.png"} if image else {}
    return {"id": f"r{number % 7}", "conversations": talk, **shown}  # ids repeat


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, goldens):
    """Callable (workdir, cache folder or None) -> flags of `vlmprune recover` there."""
    root = tmp_path_factory.mktemp("taught")
    records = [record(n, "It is a red car." if n % 2 else "yes", image=n % 3 > 0, turns=1 + n % 3) for n in range(12)]
    records += [record(12, "It is 10:45. " * 40), record(13, "no", name="none.png")]
    losses = {"ce": 0.5, "kl": 0.5, "teacher_inputs": "own", "kl_positions": "labels"}
    recover = {"trainable": "projector", "control": False, "batch_size": 4, "steps": 4, "log_every": 1}
    config = write_experiment(
        root, goldens, records,
        data={"length_buckets": [48, 96], "group_by": "modality_length", "on_error": "skip"},
        recover={**recover, "losses": losses, "teacher_top_k": 8},
    )  # fmt: skip
    model = load(root / "teacher")
    assert model.cfg.text.vocab_size == VOCAB
    plan = make_plan(score(model, None, criterion="l2"), model.cfg, method="width", ratio=0.1)
    prune_folder(root / "teacher", plan, root / "pruned", dtype="float32")

    def flags(workdir: str, folder: str | None, *more: str) -> list[str]:
        if not (root / workdir).exists():
            shutil.copytree(root / "pruned", root / workdir / "pruned")
            (root / workdir / "plan.json").write_text(plan.to_json())
        cached = [] if folder is None else [f"--config.recover.teacher_cache={root / folder}"]
        return [config, f"--workdir={root / workdir}", *cached, *more]

    flags.root = root
    return flags


@pytest.fixture(scope="module")
def straight(experiment):
    """The cache of a run that nothing disturbed."""
    assert main(["recover", *experiment("s", "straight", ONE_STEP)]) == 0
    return experiment.root / "straight"


def metrics(root, workdir: str) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (root / workdir / "training/metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in ("loss", "ce", "kl", "grad_norm", "empty_rows")}


def held(folder) -> dict[str, np.ndarray]:
    """Everything in a cache."""
    found = ArrayCache(folder, {k: v for k, v in json.loads((folder / "cache.json").read_text()).items()})
    return {key: found[key] for key in found._entries}


LOAD = Work.load


def only_the_student(self, folder, parts):
    assert folder != self.teacher
    return LOAD(self, folder, parts)


@pytest.mark.slow
def test_the_whole_vocabulary_trains_like_the_teacher_itself(experiment, capsys, monkeypatch):
    """With images, text alone, several turns, a cut record, buckets and a skipped record; again without a pass, and
    with the vision tower's features from a cache as well."""
    root = experiment.root
    whole = f"--config.recover.teacher_top_k={VOCAB}"
    assert main(["recover", *experiment("beside", None)]) == 0
    assert main(["recover", *experiment("cached", "whole", whole)]) == 0
    assert "teacher's top-416 logits: 13 of 14 records to compute" in capsys.readouterr().out
    expected, found = metrics(root, "beside"), metrics(root, "cached")
    assert sum(found["empty_rows"]) >= 1
    assert found["loss"][0] > found["loss"][-1]
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=5e-6, err_msg=name)
    monkeypatch.setattr(Work, "load", only_the_student)
    features = f"--config.data.feature_cache={root / 'features'}"
    assert main(["recover", *experiment("both", "whole", whole, features)]) == 0
    assert list((root / "features").glob("*.safetensors"))
    for name, values in metrics(root, "both").items():
        np.testing.assert_allclose(values, found[name], rtol=5e-6, err_msg=name)
    assert main(["recover", *experiment("half", "whole", whole, "--config.data.fraction=0.5")]) == 0
    assert "0 of 7 records to compute" in capsys.readouterr().out


def test_with_cached_features_the_teacher_decodes_nothing(experiment, straight, monkeypatch):
    """Every image is decoded once, for its features, and the teacher says of them what it says of the images."""
    decode, decoded, loaded = ImageLoader.load, list[str](), list[list[str]]()

    def listed(self, path, *args):
        decoded.append(path.name)
        return decode(self, path, *args)

    def load_parts(self, folder, parts):
        if folder == self.teacher:
            loaded.append(parts)
        return LOAD(self, folder, parts)

    monkeypatch.setattr(ImageLoader, "load", listed)
    monkeypatch.setattr(Work, "load", load_parts)
    root = experiment.root
    features = f"--config.data.feature_cache={root / 'features'}"
    assert main(["recover", *experiment("both-caches", "beside-features", features, ONE_STEP)]) == 0
    assert sorted(decoded) == [f"img{number}.png" for number in range(4)]
    assert loaded == [["text", "projector"]]
    expected, ours = held(straight), held(root / "beside-features")
    assert expected.keys() == ours.keys()
    for key, array in ours.items():
        np.testing.assert_allclose(array, expected[key], rtol=1e-5, err_msg=key)


def test_a_disk_that_is_too_small_is_noticed_before_the_pass(experiment, straight, capsys, monkeypatch):
    asked = []

    def full(folder, needed):
        asked.append(needed)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, needed))
        check_space(folder, needed)

    monkeypatch.setattr(record_cache, "check_space", full)
    monkeypatch.setattr(Work, "load", only_the_student)
    assert main(["recover", *experiment("small", "small-cache")]) == 2
    line = capsys.readouterr().err.strip()
    assert "small-cache/*.safetensors: needs 16 MiB but only 0 MiB are free: make room or choose" in line
    assert "\n" not in line
    assert asked == [sum(array.nbytes for array in held(straight).values())]


def stop(monkeypatch, after: int, how) -> list[int]:
    """Makes `how` happen when a number of records is kept; the list counts all of them."""
    kept, original = [], TeacherRows.arrays

    def arrays(self, *args):
        kept.append(len(kept))
        if len(kept) == after:
            how()
        return original(self, *args)

    monkeypatch.setattr(TeacherRows, "arrays", arrays)
    return kept


def killed():
    raise KeyboardInterrupt


def test_an_interrupted_pass_continues_to_the_same_bytes(experiment, straight, capsys, monkeypatch):
    """SIGTERM keeps all that was computed; after a kill whole shards count, here of one record each."""
    flags, root = ["recover", *experiment("stopped", "stopped-cache", ONE_STEP)], experiment.root
    kept = stop(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    capsys.readouterr()
    assert main(flags) == 143
    line = "vlmprune: teacher's top-8 logits stopped on SIGTERM after 2 of 4; the same command continues"
    assert capsys.readouterr().err.strip() == line
    assert len(kept) == 8
    monkeypatch.undo()
    monkeypatch.setattr(cache, "SHARD_BYTES", 1)
    stop(monkeypatch, 5, killed)
    assert main(flags) == 130
    assert "teacher's top-8 logits: 5 of 14 records to compute" in capsys.readouterr().out
    assert not (root / "stopped/training/checkpoints").exists()
    monkeypatch.undo()
    kept = stop(monkeypatch, 99, killed)
    assert main(flags) == 0
    assert "teacher's top-8 logits: 1 of 14 records to compute" in capsys.readouterr().out
    assert len(kept) == 1
    expected, ours = held(straight), held(root / "stopped-cache")
    assert len(expected) == 2 * 13
    assert expected.keys() == ours.keys()
    assert all(np.array_equal(ours[key], array) for key, array in expected.items())
    assert metrics(root, "stopped") == metrics(root, "s")


def test_the_longest_rows_come_first_in_the_smallest_buckets(experiment, monkeypatch):
    """What does not fit in memory is met at once; the last batch is filled up."""
    seen, read = [], record_cache.train_batches

    def watched(*args, **options):
        for batch in read(*args, **options):
            seen.append((batch.arrays["attention_mask"], batch.record_ids))
            yield batch

    def ended(cache):
        raise KeyboardInterrupt

    monkeypatch.setattr(ArrayCache, "publish", ended)
    monkeypatch.setattr(record_cache, "train_batches", watched)
    assert main(["recover", *experiment("ordered", "ordered-cache")]) == 130
    lengths = [mask.sum(1).max() for mask, _ in seen]
    assert lengths == sorted(lengths, reverse=True)
    assert [mask.shape[1] for mask, _ in seen] == [96 if length > 48 else 48 for length in lengths]
    assert {mask.shape[1] for mask, _ in seen} == {48, 96}
    assert [sum(map(bool, names)) for _, names in seen] == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("folder", "flags", "message"),
    [
        ("straight", "recover.teacher_top_k=9", "recover.teacher_top_k was 8, now 9"),
        ("straight", "recover.compute_dtype=bfloat16", 'recover.compute_dtype was "float32", now "bfloat16"'),
        ("straight", "data.length_buckets=(48,64)", "data.max_length was 96, now 64"),
        ("straight", "data.aspect_ratio=square", 'data.aspect_ratio was "auto", now "square"'),
        ("straight", "model.dtype=bfloat16", 'model.dtype was "float32", now "bfloat16"'),
        ("new", "recover.losses.l2=0.5", "l2 cannot be computed from cached top-k logits of a teacher"),
        ("new", "recover.losses.teacher_inputs=student", 'needs teacher_inputs="own"'),
        ("new", "recover.teacher_top_k=0", "recover.teacher_top_k=0 must be at least 1"),
        ("new", "recover.teacher_top_k=417", "teacher_top_k=417 must be at most the vocabulary size, 416"),
        ("new", "mesh.data=8", "a micro-batch of 4 rows (batch_size / accumulation) must be a multiple of"),
        ("teacher", "data.seed=0", "teacher: is neither empty nor a cache"),
        ("records.json", "data.seed=0", "records.json: "),
    ],
)
def test_what_is_refused_in_one_line(experiment, straight, capsys, folder, flags, message):
    before = sorted(path.name for path in straight.iterdir())
    capsys.readouterr()
    assert main(["recover", *experiment("refused", folder, f"--config.{flags}", "--overwrite")]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert (f"{straight}: this cache was computed from other inputs" in line) == (folder == "straight")
    assert "\n" not in line
    assert sorted(path.name for path in straight.iterdir()) == before


def test_another_teacher_is_refused(experiment, straight, capsys):
    config = experiment.root / "teacher/tokenizer_config.json"
    text = config.read_text()
    config.write_text(text.rstrip() + " \n")
    capsys.readouterr()
    code = main(["recover", *experiment("refused", "straight", "--overwrite")])
    config.write_text(text)
    assert (code, "model.hf_dir was " in capsys.readouterr().err) == (2, True)
