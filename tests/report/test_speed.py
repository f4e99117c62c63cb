"""What the report says of measured speed, and of cost by shape."""

from msgspec.structs import replace
from report_cases import BENCH, SPEED, write_several

from vlmprune_jax.report.build import build_report
from vlmprune_jax.report.speed import bench_tables, speed_notes, speed_tables
from vlmprune_jax.workdir.artefact import read_artefact, write_artefact
from vlmprune_jax.workdir.comparison import benchmark_rows
from vlmprune_jax.workdir.result import Costs, Workload, read_result
from vlmprune_jax.workdir.speed import Bench, Speed

LABELS = {"depth": "depth 30 %", "depth-sft": "depth 30 %, SFT"}


def test_speed_is_told_with_its_range_and_where_it_was_measured(workdir):
    page = build_report(workdir).read_text()
    assert "Speed was not measured: <code>vlmprune run --config=FILE.py" in page
    assert "--config.speed.rounds=5" in page
    write_artefact(workdir / "speed.json", SPEED)
    page = build_report(workdir).read_text()
    assert "Speed was not measured" not in page
    assert "Measured on Some &lt;b&gt;CPU (load 0.5 before) in float32: 1 row(s) of 640 tokens, an image first" in page
    times, table = speed_tables(read_artefact(workdir / "speed.json", Speed), LABELS)
    unpruned, pruned = table.rows
    assert unpruned == ("unpruned", "100 (90 to 110)", "20 (19 to 21)", "200 (100 to 300)", "1.0")
    assert pruned[:2] == ("depth 30 % (and 1 of its shape)", "150 (140 to 165)")
    assert pruned[4] == ""
    # Round by round: prefill 1.5, 1.56, 1.5 times; decoding 0.95, 1.05, 0.98.
    assert times.rows == (
        ("depth 30 % (and 1 of its shape)", "1.50 (1.50 to 1.56)", "0.98 (0.95 to 1.05), no speed-up"),
    )
    told = "No speed-up in generating tokens: depth 30 % (and 1 of its shape). Not every round was faster."
    spread = "Rounds of a model differ by up to 20.0 % in prefill, 10.0 % in decoding; other work disturbed them"
    assert [line.partition(": compare")[0] for line in speed_notes(SPEED, LABELS)[1:]] == [
        spread,
        told.partition(": compare")[0],
    ]
    steady = replace(SPEED.pairs[0].unpruned, decode=(20.0, 19.5, 20.4))
    steady = replace(SPEED, pairs=[replace(SPEED.pairs[0], unpruned=steady, pruned=steady)])
    assert speed_notes(steady)[1].endswith("4.5 % in decoding.")


def test_a_card_tells_speeds_behind_the_scores(workdir):
    result = read_result(workdir)
    run, teacher, sets = result.runs[0], result.teacher, result.sets
    assert len(benchmark_rows(run, teacher, sets)) == len(sets)
    speeds = SPEED.medians()
    rows = benchmark_rows(replace(run, speed=speeds["depth"]), replace(teacher, speed=speeds[""]), sets)[len(sets) :]
    assert [row[1:] for row in rows] == [("100", "150", "150.00", ""), ("20", "20", "100.00", "")]
    assert rows[1][0] == "generated tokens per second, our forward on the machine of the run"


def test_a_bench_in_the_workdir_is_told(workdir):
    write_artefact(workdir / "bench.json", BENCH)
    page = build_report(workdir).read_text()
    assert "Times as fast, round by round" in page
    assert "Measured on Some &lt;b&gt;CPU, 2 thread(s), load 0.5 before: one prompt" in page
    times = bench_tables(read_artefact(workdir / "bench.json", Bench))[2]
    assert times.rows[0][:4] == ("pruned", "llama_cpp", "teacher", "1.50 (1.50 to 1.56)")


def test_slower_in_every_round():
    pair = SPEED.pairs[0]
    turned = replace(SPEED, pairs=[replace(pair, unpruned=pair.pruned, pruned=pair.unpruned)])
    assert speed_tables(turned)[0].rows[0][1].endswith("), slower")


def test_costs_are_told_beside_those_of_the_unpruned_model(workdir):
    write_several(workdir)
    result = read_result(workdir)
    before = Costs(forward_flops=4e12, kv_bytes_per_token=1000, file_bytes=8_000_000)
    after = Costs(forward_flops=3e12, kv_bytes_per_token=500, file_bytes=6_000_000)
    costed = replace(
        result,
        workload=Workload(length=640, images=1, dtype="bfloat16"),
        teacher=replace(result.teacher, costs=before),
        runs=[replace(run, costs=after) for run in result.runs],
    )
    write_artefact(workdir / "result.json", costed)
    page = build_report(workdir).read_text()
    for cell in ("4,000.00", "3,000.00", "75.0", "500", "50.0", "8.00", "6.00"):
        assert f"<td>{cell}</td>" in page
    assert "a forward pass of 640 tokens, those of 1 image(s) among them" in page
