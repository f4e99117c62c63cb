"""Damaged files of a workdir, ours or somebody else's: reading them back returns or raises one line."""

import io
import json

import jax
import msgspec
import numpy as np
import recover_cases as cases
from fuzz_cases import (
    damaged_archives,
    edited,
    fuzz,
    fuzz_file,
    fuzz_folder,
    json_files,
    json_lines,
    reads,
    scores_of,
    with_member,
)
from hypothesis import strategies as st

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import AXES, LAYERS, Key
from vlmprune_jax.core.prune import KeptVocabulary, PrunePlan, Scores
from vlmprune_jax.core.prune.calibration import TOKEN_TYPES
from vlmprune_jax.core.prune.routing import SUMS, Routing
from vlmprune_jax.core.prune.surgery import check_plan_is_for
from vlmprune_jax.core.prune.tables import affected_tokens, compare
from vlmprune_jax.core.recovery.checkpoint import Checkpointer
from vlmprune_jax.core.recovery.metrics import METRICS_FILE, Recorder
from vlmprune_jax.core.recovery.program import TrainState
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.report.figures import removed_section
from vlmprune_jax.run.workdir import content as provenance
from vlmprune_jax.run.workdir.ledger import Task, finished_stages, run_task, write_text

CFG = cases.config()
MADE_FROM = {"tower": {"weights": "a1", "layers": 3}, "dtype": "float32"}


# --- what pruning hands on -------------------------------------------------------------------------------------------


def test_plans(tmp_path):
    path = tmp_path / "plan.json"
    plan = make_plan(scores_of(CFG), CFG, method="width", ratio=0.1)
    kept = KeptVocabulary(CFG.text.vocab_size, (0, 1, 2, 5), "x")
    path.write_text(plan.trimming(kept).to_json())

    def read():
        plan = PrunePlan.from_json(path)
        for layer in plan.layers:
            assert all(type(index) is int for units in layer.kept.values() for index in (layer.index, *units))
        assert isinstance(plan.actual_ratio, float)
        assert plan.to_json()

    fuzz_file(150, path, read)


AXIS_SIZES = st.integers(1, 12) | st.sampled_from([1000, 2**16, 2**24 + 1, 2**31 - 1])


@st.composite
def ranges_below(draw, size):
    """Kept indices as the file lists them: nearly always ascending ranges below the size."""
    edges = draw(st.lists(st.integers(0, size - 1 + draw(st.sampled_from([0, 0, 0, 1]))), min_size=1, max_size=6))
    edges = sorted({*edges, *draw(st.sampled_from([(), (0, size - 1)]))})
    pairs = [*zip(edges[::2], edges[1::2], strict=False)]
    return ",".join(f"{low}-{high}" for low, high in pairs) or str(edges[0])


@st.composite
def layer_plans(draw):
    """Sizes by axis of a layer, of any of the package's axes, and what is kept of it."""
    sizes = draw(st.dictionaries(st.sampled_from([*AXES, "x"]), AXIS_SIZES, min_size=1))
    return sizes, {axis: draw(ranges_below(size)) for axis, size in sizes.items()}


def test_sizes_of_plans(tmp_path):
    """Axes without their parent, of another kind of layer, sizes that do not divide, ranges of any length."""
    plan = make_plan(scores_of(CFG), CFG, method="width", ratio=0.1)
    whole, path = json.loads(plan.to_json()), tmp_path / "plan.json"
    like = st.lists(layer_plans(), max_size=4)
    alike = st.builds(lambda layer, n: [layer] * n, layer_plans(), st.integers(1, 40))
    tokens = st.none() | AXIS_SIZES.flatmap(lambda rows: st.tuples(st.just(rows), ranges_below(rows)))

    @fuzz(60, layers=like | alike, name=st.sampled_from(["text", "vision"]), tokens=tokens)
    def check(layers, name, tokens):
        sizes, kept = {f"{name}/layers": len(layers)}, {}
        for i, (before, units) in enumerate(layers):
            sizes |= {f"{name}/{i}/{axis}": size for axis, size in before.items()}
            kept |= {f"{name}/{i}/{axis}": ranges for axis, ranges in units.items()}
        if tokens is not None:
            sizes["text/vocab"], kept["text/vocab"] = tokens
        if name != "text":
            sizes, kept = {**whole["sizes_before"], **sizes}, {**whole["kept"], **kept}
        data = {"sizes_before": sizes, "kept": kept, "tokenizer": tokens and "x"}
        path.write_text(json.dumps({**whole, **data}))
        plan = reads(lambda: PrunePlan.from_json(path), path.name)
        if plan is not None:
            assert repr(plan)
            assert compare(plan, plan)
            reads(lambda: [*removed_section(tmp_path, [path.name])], "")
            reads(lambda: check_plan_is_for(Model({}, CFG), plan), "plan of another model")

    check()


def score_files(path):
    """Archives with an array, its header or what describes all of them edited, or damaged as bytes."""
    with np.load(path) as arrays:
        about, names = json.loads(str(arrays["meta"])), [f"{name}.npy" for name in arrays.files]

    def saved(name, array):
        np.save(content := io.BytesIO(), array)
        return with_member(path.read_bytes(), name, content.getvalue())

    odd = [
        np.zeros(0), np.array(1.0), np.zeros((2, 2)), np.full(2, np.nan), np.full(2, np.inf), np.ones(2, complex),
        np.ones(2, bool), np.array(["a", "b"]), np.arange(2), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")]),
    ]  # fmt: skip
    return st.one_of(
        edited(about).map(lambda value: saved("meta.npy", np.array(json.dumps(value)))),
        st.builds(saved, st.sampled_from(sorted(names)), st.sampled_from(odd)),
        damaged_archives(path.read_bytes()),
    )


def test_scores(tmp_path):
    whole, path = tmp_path / "whole.npz", tmp_path / "scores.npz"
    scores_of(CFG).save(whole)

    def read():
        found = Scores.load(path)  # of other widths, perhaps: planning says so
        reads(lambda: (found.name, make_plan(found, CFG, method="width", ratio=0.1)))

    fuzz_file(120, path, read, files=score_files(whole))


def test_routing(tmp_path):
    whole, path, draw = tmp_path / "whole.npz", tmp_path / "routing.npz", np.random.default_rng(0)
    sums = {layer: draw.random((len(TOKEN_TYPES), len(SUMS), 4)) for layer in range(2)}
    choices = {layer: draw.integers(0, 4, (9, 2)).astype(np.uint16) for layer in range(2)}
    Routing("a", sums, choices, draw.integers(1, 4, 9).astype(np.uint8)).save(whole)

    def read():
        found = Routing.load(path)
        reads(lambda: (found.occurring, [found.affected(layer, (0, 1)) for layer in found.choices]))

    fuzz_file(120, path, read, files=score_files(whole))


def test_routing_of_other_tokens_and_models(tmp_path):
    """No tokens, types of tokens that do not exist, other layers, experts and fingerprints than the plan's."""
    path, draw = tmp_path / "routing.npz", np.random.default_rng(0)
    sizes, kept = {Key("text", None, LAYERS): 2}, {}
    for i in range(2):
        experts, neurons = (Key("text", i, axis) for axis in ("experts", "expert_mlp"))
        sizes |= {experts: 4, neurons: 8}
        kept |= {experts: (0, 2), neurons: (0, 1, 4, 5)}
    plan = PrunePlan("a", "experts", "reap", sizes, kept, 10, 9, 10)
    kinds = st.sampled_from([*TOKEN_TYPES.values()])
    types = st.lists(kinds, max_size=9) | st.lists(kinds | st.integers(0, 255), max_size=9)

    @fuzz(
        60, types=types, layers=st.sampled_from([(0, 1), (0, 1), (0,), (1, 2), (0, 1, 2)]), name=st.sampled_from("aab"),
        experts=st.sampled_from([4, 4, 3, 5]), full=st.sampled_from([1.0, 1.0, 0.0]),
    )  # fmt: skip
    def check(types, layers, name, experts, full):
        sums = {i: full * draw.random((len(TOKEN_TYPES), len(SUMS), experts)) for i in layers}
        choices = {i: draw.integers(0, experts, (len(types), 2)).astype(np.uint16) for i in layers}
        Routing(name, sums, choices, np.array(types, np.uint8)).save(path)
        routing = reads(lambda: Routing.of_plan(path, plan), path.name)
        right = full and types and {*types} <= {*TOKEN_TYPES.values()}
        assert (routing is not None) == bool(right and (name, layers, experts) == ("a", (0, 1), 4))
        if routing is not None:
            assert affected_tokens(plan, routing)

    check()


# --- what lets a stage be skipped or continued -----------------------------------------------------------------------


class Facts(msgspec.Struct):
    number: int
    share: float


def test_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "commit", lambda: None)  # which asks git
    out = tmp_path / "out.txt"
    (tmp_path / "in.txt").write_text("input")

    def body():
        write_text(out, "made")
        return Facts(number=1, share=2.0)

    files = {"inputs": {"data.train": tmp_path / "in.txt"}, "outputs": [out]}
    stage = Task(name="score", function=body, workdir=tmp_path, settings={"ratio": 0.3}, facts=Facts, **files)

    def run(overwrite=False):
        return run_task(stage, overwrite=overwrite, say=lambda text: None)

    run()
    whole = json.loads(stage.record.read_text())

    @fuzz(60, content=json_files(whole))
    def check(content):
        stage.record.write_bytes(content)
        reads(run, out.name, stage.record.name)
        reads(lambda: run(overwrite=True), out.name, stage.record.name)
        stage.record.write_bytes(content)
        finished_stages(tmp_path)  # of a damaged record nothing is told

    check()


def test_metrics_of_a_resumed_run(tmp_path):
    lines = [{"step": step, "loss": 1.0 / step, "ce": 0.5, "seconds": 0.1} for step in range(1, 6)]
    path = tmp_path / METRICS_FILE

    def resume():
        with Recorder(tmp_path, 3, 6, 1, False, jax.devices()[:1]) as recorder:
            return recorder.last

    @fuzz(40, content=json_lines(lines), skipped=json_lines([{"step": 1, "record": "r1", "reason": "too long"}]))
    def check(content, skipped):
        path.write_bytes(content)
        (tmp_path / "skipped-0.jsonl").write_bytes(skipped)
        reads(resume, path.name, "skipped-0.jsonl")

    check()


def test_array_caches(tmp_path):
    folder = tmp_path / "cache"
    cache = ArrayCache(folder, MADE_FROM)
    cache.add({f"k{number}": np.full((2, 3), number, np.float32) for number in range(3)})
    cache.publish()
    assert len([*folder.iterdir()]) == 2

    def read():
        cache = ArrayCache(folder, MADE_FROM)
        return [cache[f"k{number}"] for number in range(3)]

    fuzz_folder(60, folder, read)


def test_recovery_checkpoints(tmp_path):
    folder, weights = tmp_path / "checkpoints", {"weight": jax.numpy.arange(6.0).reshape(2, 3)}
    state = TrainState(weights, (), jax.numpy.int32(1), jax.numpy.zeros(2, jax.numpy.uint32))
    with Checkpointer(folder, MADE_FROM, 2) as saver:
        saver.save(1, state, {"at": 5})

    def restore():
        with Checkpointer(folder, MADE_FROM, 2) as saver:
            return saver.restore(state)

    assert restore()[1] == {"at": 5}
    fuzz_file(30, folder / "1/meta/metadata", restore, folder.name)
