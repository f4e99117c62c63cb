"""Tables of models and evaluation sets, and the sentence about the best."""

import re

from msgspec.structs import replace
from report_cases import BENCH, NOISY, SIZE, SPEED, change, evaluated, write_several

from vlmprune_jax.run.report.build import build_report
from vlmprune_jax.run.report.speed import bench_tables, speed_tables
from vlmprune_jax.run.report.tables import key_numbers, lead, tables_of
from vlmprune_jax.run.workdir.artefact import read_artefact, write_artefact
from vlmprune_jax.run.workdir.comparison import benchmark_rows, compare
from vlmprune_jax.run.workdir.groups import comparison_of_run
from vlmprune_jax.run.workdir.result import Costs, Run, Workload, read_result
from vlmprune_jax.run.workdir.speed import Bench, Speed


def test_table(workdir):
    change(workdir, 1, decoder_ratio=0.4, speed=SPEED.medians()["depth"])
    (table,) = tables_of(comparison_of_run(read_result(workdir)))
    assert table.header[:3] == ("model", "retained, %", "size, %")
    assert table.header[: table.first] == ("model", "retained, %", "size, %", "accuracy, %")
    assert all(len(row) == len(table.header) for row in table.rows)
    unpruned, depth, recovered, _ = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert (unpruned["accuracy, %"], unpruned["retained, %"], unpruned["size, %"]) == ("80.00", "100.00", "100.0")
    assert (depth["model"], depth["data, %"], depth["accuracy, %"]) == ("depth 30 %", "", "25.00")
    assert depth["retained, %"] == "31.25"
    assert (recovered["model"], recovered["data, %"], recovered["retained, %"]) == ("depth 30 %, SFT", "5", "95.00")
    assert (recovered["decoding, x"], recovered["prompt, x"]) == ("not measurable", "1.50")
    assert recovered["removed, % (of decoder)"].endswith(" (40.0)")


def test_retention_beside_a_control(workdir):
    """The unpruned model was trained as well: its row, and what the recovered model retains of it."""
    result, evaluations = read_result(workdir), {"questions": evaluated(0.95)}
    teacher = {"questions": evaluated(0.8)}
    control = Run(
        name="control-sft", parameters=SIZE, recovery="sft", data_fraction=0.05, seconds=9.5,
        path="control/sft/recovered", evaluation=compare(evaluations, teacher),
    )  # fmt: skip
    scored = replace(evaluated(0.76), retained_interval=(94, 96), control_interval=(78, 82))
    recovered = compare({"questions": scored}, teacher, evaluations)
    runs = [replace(run, evaluation=recovered) if run.name == "depth-sft" else run for run in result.runs]
    result = replace(result, controls=[control], runs=runs)
    write_artefact(workdir / "result.json", result)
    (table,) = tables_of(comparison_of_run(result))
    place = table.header.index("of control, %")
    cells = {row[0]: (row[1], row[place]) for row in table.rows}
    assert cells["unpruned"] == ("100.00", "")
    assert cells["unpruned, SFT"] == ("118.75", "")
    assert cells["depth 30 %, SFT"] == ("95.00 (94.0 to 96.0)", "80.00 (78.0 to 82.0)")
    assert table.title.endswith(" (95 % intervals in brackets)")
    assert key_numbers(comparison_of_run(result))[:2] == [
        ("retained", "95.00 % (94.0 to 96.0)"), ("of control", "80.00 % (78.0 to 82.0)")
    ]  # fmt: skip
    page = build_report(workdir).read_text()
    assert "Of control: share of the score of the unpruned model after the same recovery" in page


def test_the_headline_has_retention_size_and_speed(workdir):
    costs = Costs(forward_flops=1e9, kv_bytes_per_token=10, file_bytes=2_000_000)
    change(workdir, 1, decoder_ratio=0.4, speed=SPEED.medians()["depth"], costs=costs)
    result = read_result(workdir)
    teacher = replace(result.teacher, costs=replace(costs, file_bytes=3_000_000), passthrough=1000)
    write_artefact(workdir / "result.json", replace(result, teacher=teacher))
    comparison = comparison_of_run(read_result(workdir))
    numbers = {
        "retained": "95.00 %", "size": "66.0 %",
        "decoding speed-up": "not measurable on this busy machine (repeats differ by 10 %)",
        "prompt speed-up": "1.50 (1.50 to 1.52)",
    }  # fmt: skip
    assert dict(key_numbers(comparison)) == numbers
    assert lead(comparison) == "; ".join(["Best of 3 models: depth 30 %, SFT", *map(" ".join, numbers.items())])
    page = build_report(workdir).read_text()
    assert re.findall(r"<dt>(.*?)</dt>", page) == ["retained", "size", "prompt speed-up"]
    assert f"also counts 1,000 in unused tower layers or an audio tower ({SIZE + 1000:,} unpruned)" in page


def test_several_sets(several):
    page = build_report(several).read_text()
    assert "<dt>retained (mean of 2 sets)</dt><dd>82.50 %</dd>" in page
    assert "accuracy" not in page.lower().split("<summary>")[0]
    summary, scores, kept = tables_of(comparison_of_run(read_result(several)))
    assert summary.header[:4] == ("model", "retained, %", "size, %", "paper avg, %")
    # docs 50 %, mme 80 %; in the paper's average 0.4 + 0.6 of 0.8 + 0.75
    assert [(row[1], row[3]) for row in summary.rows[:2]] == [("100.00", "100.00"), ("65.00", "64.52")]
    assert scores.ascending == ("wiki",)
    assert scores.title == "docs: anls in %, mme: perception, wiki: bits in bit"
    assert scores.rows[1] == ("depth 30 %", "40.00", "1200.00", "2.00")
    assert kept.rows[0] == ("depth 30 %", "50.00", "80.00", "50.00")
    assert kept.header == ("model", "docs", "mme", "wiki")


# --- what the report says of measured speed --------------------------------------------------------------------------


def test_speed_is_told_with_its_range_and_where_it_was_measured(workdir):
    page = build_report(workdir).read_text()
    assert "Speed was not measured: <code>vlmprune run --config=FILE.py" in page
    assert "--config.speed.rounds=5" in page
    write_artefact(workdir / "speed.json", SPEED)
    page = build_report(workdir).read_text()
    assert "Speed was not measured" not in page
    assert "Measured on Some &lt;b&gt;CPU (load 0.5 before): 1 row(s) of 640 tokens, an image first" in page
    labels = {"depth": "depth 30 %", "depth-sft": "depth 30 %, SFT"}
    times, table = speed_tables(read_artefact(workdir / "speed.json", Speed), labels)
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
