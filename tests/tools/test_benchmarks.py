"""Benchmarks: each at a tiny size, which checks by itself that both sides compute the same; what a compiled program
receives from other chips, and touches in HBM, read off its text; and the vision tower's share of the FLOPs.
"""

import importlib
import json
import subprocess
import sys

import pytest
from repository import ROOT


def lines_of(benchmark, *flags):
    """The lines of JSON that a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / benchmark), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_training_benchmark_runs(tmp_path):
    flags = ["--tiny", "--batch=2x24", "--rounds=2", f"--work={tmp_path}"]
    ours, peft, ratios = lines_of("train_step.py", *flags)
    assert [line["side"] for line in (ours, peft, ratios)] == ["ours", "peft", "ours/peft"]
    for line in (ours, peft):
        assert line["tokens_per_second"] == pytest.approx(2 * 24 / line["step_seconds"], rel=0.2)  # rounded to 1 ms
        assert 0.1 < line["peak_rss_gib"] < 2
    assert ratios["tokens_per_second"] == pytest.approx(ours["tokens_per_second"] / peft["tokens_per_second"], rel=0.01)


@pytest.mark.slow
def test_the_scoring_benchmark_runs():
    lines = lines_of("scoring.py", "--tiny", "--batch=4x24", "--rounds=2")
    assert [line["side"] for line in lines] == ["ours", "torch", "ratio"] * 2
    for line in lines[2::3]:
        assert line["speed"] > 0
        assert 0.05 < line["memory"] < 5


@pytest.mark.slow
def test_recommendations_land_in_their_interval(tmp_path):
    """Each is followed to the end: pruned, recovered as advised, and evaluated on the demo's questions."""
    flags = [f"--workdir={tmp_path / 'checks'}", "--config.recover.control=False"]
    rows = [row for row in lines_of("recommend_check.py", *flags) if "case" in row]
    assert [row["case"] for row in rows if row["inside"]] == ["trained", "untrained", "hybrid", "projector"], rows


@pytest.mark.slow
def test_the_benchmark_of_full_size_runs(tmp_path):
    found = lines_of("full_size.py", "--tiny", "--model=internvl", f"--work={tmp_path}")
    lines = {line["step"]: line for line in found}
    assert list(lines) == ["cp_input", "cat", "read", "load", "inspect", "depth", "cp_output", "width", "ratios"]
    assert lines["cp_input"]["output_bytes"] == lines["cp_input"]["input_bytes"]
    assert lines["cp_output"]["output_bytes"] == lines["depth"]["output_bytes"] < lines["depth"]["input_bytes"]
    assert lines["width"]["output_bytes"] < lines["depth"]["input_bytes"]
    assert 0.05 < lines["depth"]["peak_rss_gib"] < 1
    assert lines["ratios"]["depth_to_cp_of_input_and_output"] > 0
    assert list(tmp_path.iterdir()) == []


# --- programs as text ------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    """Callable name -> the module of that name among the benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = {*sys.modules}
    yield importlib.import_module
    for name in {"compiled_text", "tower_share", "models", "plan"} - before:
        sys.modules.pop(name, None)


# Two tokens over three layers: weights are sliced inside a nested fusion, the cache is updated in place, a copy of the
# loop's input is made once, and what lies in on-chip memory is free.
HLO = """\
HloModule jit_decode, is_scheduled=true

%bitcasts (p: bf16[6,8]) -> bf16[8,6] {
  %p = bf16[6,8]{1,0} parameter(0)
  ROOT %turned = bf16[8,6]{0,1} bitcast(%p)
}
%slices (p: bf16[3,8,8], i: s32[]) -> bf16[8,8] {
  %p = bf16[3,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %part = bf16[1,8,8]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  ROOT %layer = bf16[8,8]{1,0} bitcast(%part)
}
%product (p.0: bf16[3,8,8], p.1: s32[], p.2: bf16[4,8]) -> bf16[4,8] {
  %p.0 = bf16[3,8,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = bf16[4,8]{1,0:T(8,128)S(1)} parameter(2)
  %w = bf16[8,8]{1,0} fusion(%p.0, %p.1), kind=kLoop, calls=%slices
  ROOT %y = bf16[4,8]{1,0:T(8,128)S(1)} convolution(%p.2, %w), dim_labels=bf_oi->bf
}
%update (c: bf16[3,16,8], n: bf16[1,1,8], i: s32[]) -> bf16[3,16,8] {
  %c = bf16[3,16,8]{2,1,0} parameter(0)
  %n = bf16[1,1,8]{2,1,0:S(1)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = bf16[3,16,8]{2,1,0} dynamic-update-slice(%c, %n, %i, %i, %i)
}
%head (p.0: bf16[6,8], p.1: bf16[4,8]) -> bf16[4,6] {
  %p.0 = bf16[6,8]{1,0} parameter(0)
  %p.1 = bf16[4,8]{1,0:S(1)} parameter(1)
  %w = bf16[8,6]{0,1} fusion(%p.0), kind=kLoop, calls=%bitcasts
  ROOT %y = bf16[4,6]{1,0:S(1)} convolution(%p.1, %w), dim_labels=bf_io->bf
}
%three (s.1: (s32[])) -> pred[] {
  %bound.1 = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%i, %bound.1), direction=LT
}
%two (s.2: (s32[])) -> pred[] {
  %bound.2 = s32[] constant(2)
  ROOT %less.2 = pred[] compare(%i, %bound.2), direction=LT
}
%layers (s.3: (s32[], bf16[3,8,8], bf16[3,16,8])) -> (s32[], bf16[3,8,8], bf16[3,16,8]) {
  %w = bf16[3,8,8]{2,1,0} get-tuple-element(%s.3), index=1
  %c = bf16[3,16,8]{2,1,0} get-tuple-element(%s.3), index=2
  %i = s32[]{:S(2)} get-tuple-element(%s.3), index=0
  %x = bf16[4,8]{1,0:T(8,128)S(1)} broadcast(%i), dimensions={}
  %y = bf16[4,8]{1,0:T(8,128)S(1)} fusion(%w, %i, %x), kind=kOutput, calls=%product
  %n = bf16[1,1,8]{2,1,0:S(1)} slice(%y), slice={[0:1], [0:8]}
  %kept = bf16[3,16,8]{2,1,0} fusion(%c, %n, %i), kind=kLoop, calls=%update
  ROOT %t = (s32[], bf16[3,8,8], bf16[3,16,8]) tuple(%i, %w, %kept)
}
%tokens (s.4: (s32[], bf16[6,8])) -> (s32[], bf16[6,8]) {
  %t = (s32[], bf16[3,8,8], bf16[3,16,8]) while(%s.4), condition=%three, body=%layers
  %h = bf16[6,8]{1,0} get-tuple-element(%s.4), index=1
  %x = bf16[4,8]{1,0:S(1)} get-tuple-element(%t), index=1
  %logits = bf16[4,6]{1,0:S(1)} fusion(%h, %x), kind=kOutput, calls=%head
  ROOT %u = (s32[], bf16[6,8]) tuple(%i, %h)
}
ENTRY %main (a: bf16[6,8]) -> (s32[], bf16[6,8]) {
  %a = bf16[6,8]{1,0} parameter(0)
  %b = bf16[6,8]{0,1} copy(%a)
  ROOT %loop = (s32[], bf16[6,8]) while(%b), condition=%two, body=%tokens
}
"""


def test_a_loop_reads_its_slices_and_updates_in_place(benchmark):
    layer, update, head = 8 * 8 * 2, 8 * 2, 6 * 8 * 2
    assert benchmark("compiled_text").hbm_bytes(HLO) == 2 * (3 * (layer + update) + head) + 2 * head


STEP = """\
HloModule jit_step, is_scheduled=true

%condition.1 (p.1: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}
%fused.1 (p.2: bf16[1,8]) -> bf16[4,8] {
  ROOT %ag.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}
%fused.2 (p.3: bf16[1,8]) -> bf16[4,8] {
  ROOT %ag.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}
%body.1 (p.4: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %start = bf16[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused.1
  %done = bf16[4,8]{1,0} fusion(%start), kind=kLoop, calls=%fused.2
  ROOT %sum = (f32[16]{0}, bf16[4]{0}) all-reduce(%done, %y), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add.1
}
%shared.1 (p.6: f32[4]) -> f32[4] {
  ROOT %next = f32[4]{0} collective-permute(%p.6), channel_id=10, source_target_pairs={{0,1},{1,0}}
}
%ring.condition (p.8: (bf16[1,8], u32[], u32[])) -> pred[] {
  %bound.2 = u32[]{:T(128)} constant(8)
  %i.2 = u32[]{:T(128)} get-tuple-element(%p.8), index=1
  ROOT %less.2 = pred[]{:T(512)} compare(%i.2, %bound.2), direction=LT
}
%ring.body (p.9: (bf16[1,8], u32[], u32[])) -> (bf16[1,8], u32[], u32[]) {
  %two.2 = u32[]{:T(128)} constant(2)
  %i.3 = u32[]{:T(128)} get-tuple-element(%p.9), index=1
  %i.4 = u32[]{:T(128)} add(%i.3, %two.2)
  %here = bf16[1,8]{1,0} collective-permute(%w.1), channel_id=11, source_target_pairs={{0,1},{1,0}}
  %there = bf16[1,8]{1,0} collective-permute(%here), channel_id=12, source_target_pairs={{0,1},{1,0}}
  ROOT %state = (bf16[1,8], u32[], /*index=2*/u32[]) tuple(%there, %i.4, %rest)
}
ENTRY %main.1 (p.5: bf16[4,8]) -> bf16[4,8] {
  %ring = (bf16[1,8], u32[], u32[]) while(%tuple.2), condition=%ring.condition, body=%ring.body
  %once = f32[4]{0} call(%a), to_apply=%shared.1
  %twice = f32[4]{0} call(%once), to_apply=%shared.1
  %loop = (s32[], bf16[4,8]) while(%tuple), condition=%condition.1, body=%body.1
  %scatter = f32[6]{0} reduce-scatter(%z), channel_id=9, replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add.1
}
"""  # noqa: E501 (as XLA writes it)


STARTS = """\
ENTRY %main.2 (p.7: bf16[4,8]) -> bf16[4,8] {
  %one = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p.7), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %gone = bf16[4,8]{1,0} collective-permute-done(%one)
  %two = ((bf16[2,8]{1,0}, f32[3]{0}), (bf16[4,8]{1,0}, f32[6]{0})) all-gather-start(%a, %b), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %three = (f32[16]{0}, f32[4]{0}) all-reduce-start(%c, %d), channel_id=3, replica_groups={{0,1}}, to_apply=%add.1
}
"""  # noqa: E501 (as XLA writes it)
SLICES = """\
ENTRY %main.3 (p: bf16[64,8]) -> bf16[64,8] {
  %recv.1 = (bf16[64,8]{1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all.1), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %all = f32[16]{0} all-reduce(%y), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""  # noqa: E501 (as XLA writes it)
GATHER = 4 * 8 * 2 * 3 // 4


LOOPS = {
    "all-gather": 5 * GATHER,  # in two fusions, which are one
    "all-reduce": 5 * 2 * (16 * 4 + 4 * 2) * 3 // 4,
    "collective-permute": 2 * 4 * 4 + 4 * 2 * 8 * 2,  # called from two places, and a ring unrolled by two
    "reduce-scatter": 6 * 4,
}


def spread(source):
    """The step whose gathers the compiler spreads over a loop, for example a weight's over the chunks of another."""
    text = STEP.replace("%fused", "%async_collective_fusion")
    return text.replace("dimensions={0}\n}", f'dimensions={{0}}, metadata={{op_name="{source}"}}\n}}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STEP, LOOPS),  # as often as their loop runs
        (spread("jit(step)/dot_general"), LOOPS | {"all-gather": GATHER}),  # once where the loop does not use it
        (spread("jit(step)/while/body/dot_general"), LOOPS),
        # what starts a collective names its operands as well
        (STARTS, {"all-gather": (64 + 24) // 2, "all-reduce": (16 + 4) * 4, "collective-permute": 64}),
        # what crosses slices is a transfer of the hosts; devices of other collectives are numbered in a slice
        (SLICES, {"all-reduce": 2 * 16 * 4 * 3 // 4, "all-reduce between slices": 64 * 8 * 2}),
    ],
    ids=["loops", "once", "each", "starts", "slices"],
)
def test_bytes_that_collectives_receive(benchmark, text, expected):
    assert benchmark("compiled_text").collective_bytes(text) == expected


# --- share of the vision tower ---------------------------------------------------------------------------------------


def test_the_study_has_the_table_that_the_script_prints(benchmark, capsys):
    tower_share = benchmark("tower_share")
    tower_share.main()
    table = capsys.readouterr().out
    assert table in (ROOT / "docs/explanation/study.md").read_text(encoding="utf-8")
    assert "|LLaVA-1.5-7B|655|4|1.40|1.01|" in table
    assert tower_share.gain(1.0, 0.5) == 2.0
    assert tower_share.gain(0.0) == 1.0
    assert tower_share.gain(0.5, 0.4) == pytest.approx(1 / 0.8)
