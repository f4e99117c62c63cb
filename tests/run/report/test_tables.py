"""Tables of models and evaluation sets, and the sentence about the best."""

import re

from msgspec.structs import replace
from report_cases import SIZE, SPEED, change, evaluated

from vlmprune_jax.run.report.build import build_report
from vlmprune_jax.run.report.tables import key_numbers, lead, tables_of
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.comparison import compare
from vlmprune_jax.run.workdir.groups import comparison_of_run
from vlmprune_jax.run.workdir.result import Costs, Run, read_result


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


def test_tables_of_several_sets(several):
    summary, scores, kept = tables_of(comparison_of_run(read_result(several)))
    assert summary.header[:4] == ("model", "retained, %", "size, %", "paper avg, %")
    # docs 50 %, mme 80 %; in the paper's average 0.4 + 0.6 of 0.8 + 0.75
    assert [(row[1], row[3]) for row in summary.rows[:2]] == [("100.00", "100.00"), ("65.00", "64.52")]
    assert scores.ascending == ("wiki",)
    assert scores.title == "docs: anls in %, mme: perception, wiki: bits in bit"
    assert scores.rows[1] == ("depth 30 %", "40.00", "1200.00", "2.00")
    assert kept.rows[0] == ("depth 30 %", "50.00", "80.00", "50.00")
    assert kept.header == ("model", "docs", "mme", "wiki")
