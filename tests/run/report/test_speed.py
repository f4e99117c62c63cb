"""What the report says of measured speed, and of cost by shape."""

import re

from msgspec.structs import replace
from report_cases import BENCH, NOISY, SPEED, change, write_several

from vlmprune_jax.run.report.build import build_report
from vlmprune_jax.run.report.speed import bench_tables, speed_tables
from vlmprune_jax.run.report.tables import key_numbers, tables_of
from vlmprune_jax.run.workdir.artefact import read_artefact, write_artefact
from vlmprune_jax.run.workdir.comparison import benchmark_rows
from vlmprune_jax.run.workdir.groups import comparison_of_run
from vlmprune_jax.run.workdir.result import Costs, Workload, read_result
from vlmprune_jax.run.workdir.speed import Bench, Speed

LABELS = {"depth": "depth 30 %", "depth-sft": "depth 30 %, SFT"}


def test_speed_is_told_with_its_range_and_where_it_was_measured(finished, workdir):
    page = (finished / "report.html").read_text()
    assert "Speed was not measured: <code>vlmprune run --config=FILE.py" in page
    assert "--config.speed.rounds=5" in page
    write_artefact(workdir / "speed.json", SPEED)
    page = build_report(workdir).read_text()
    assert "Speed was not measured" not in page
    assert "Measured on Some &lt;b&gt;CPU (load 0.5 before): 1 row(s) of 640 tokens, an image first" in page
    times, table = speed_tables(read_artefact(workdir / "speed.json", Speed), LABELS)
    unpruned, pruned = table.rows
    assert unpruned == ("unpruned", "100 (98 to 103)", "20 (19 to 21)", "200 (100 to 300)", "1.0")
    assert pruned[:2] == ("depth 30 % (and 1 of its shape)", "150 (149 to 155)")
    assert pruned[4] == ""
    unclear = "not measurable on this busy machine (repeats differ by 10 %)"
    assert times.rows == (("depth 30 % (and 1 of its shape)", "1.50 (1.50 to 1.52)", unclear),)


def test_a_card_tells_speeds_behind_the_scores(workdir):
    result = read_result(workdir)
    run, teacher, sets = result.runs[0], result.teacher, result.sets
    assert len(benchmark_rows(run, teacher, sets)) == len(sets)
    speeds = SPEED.medians()
    rows = benchmark_rows(replace(run, speed=speeds["depth"]), replace(teacher, speed=speeds[""]), sets)[len(sets) :]
    unclear = "not measurable on this busy machine (repeats differ by 10 %)"
    assert [row[1:] for row in rows] == [
        ("100", "150", "1.50 (1.50 to 1.52) times as fast", ""),
        ("", "", unclear, ""),
    ]
    assert rows[1][0] == "generated tokens per second, vlmprune's JAX forward pass on this run's machine"


def test_a_bench_in_the_workdir_is_told(workdir):
    write_artefact(workdir / "bench.json", BENCH)
    page = build_report(workdir).read_text()
    assert "Times as fast: ratio of medians (interval over rounds)" in page
    assert "a process of its own with 2 thread(s)" in page
    times = bench_tables(read_artefact(workdir / "bench.json", Bench))[2]
    assert times.rows == (("pruned", "llama_cpp", "teacher", "1.50 (1.50 to 1.52)", "not measurable"),)
    noisy = [replace(BENCH.sides[0], decode=(10.0, 4.0, 18.6)), replace(BENCH.sides[1], decode=(51.0, 50.0, 51.5))]
    assert bench_tables(replace(BENCH, sides=noisy))[2].rows[0][4] == "not measurable"


def test_no_place_shows_a_speedup_of_a_busy_machine(workdir):
    """Headline, tables, key numbers, figure, card and page, of rounds that differ by 146 %."""
    speeds = NOISY.medians()
    write_artefact(workdir / "speed.json", NOISY)
    change(workdir, 1, speed=speeds["depth"])
    result = read_result(workdir)
    reason = "not measurable on this busy machine (repeats differ by {} %)"
    numbers = key_numbers(comparison_of_run(result))
    assert numbers[-2:] == [("decoding speed-up", reason.format(146)), ("prompt speed-up", reason.format(140))]
    (table,) = tables_of(comparison_of_run(result))
    assert table.rows[2][table.header.index("decoding, x")] == "not measurable"
    rows = benchmark_rows(result.best_run, result.teacher, result.sets)[1:]
    assert [row[1:] for row in rows] == [("", "", reason.format(140), ""), ("", "", reason.format(146), "")]
    page = re.sub(r"(?s)<svg.*?</svg>|<pre.*?</pre>", "", build_report(workdir).read_text())
    assert reason.format(146) in page
    shown = f"{table.rows} {numbers} {rows} {speed_tables(NOISY)[0].rows} {page}"
    for claim in ("5.10", "7.22", "510", "722.00"):
        assert claim not in shown


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
    for cell in ("4,000.000", "3,000.000", "1,000", "500", "7.63", "5.72"):
        assert f">{cell}</td>" in page
    assert "a forward pass of 640 tokens, those of 1 image(s) among them" in page
