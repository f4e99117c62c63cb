"""The report of a run: its tables and sentences, that its page is one file, samples, damage, and measured speed."""

import html
import os
import re
import struct
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from msgspec.structs import replace
from refusal import refused
from report_cases import (
    BENCH,
    NOISY,
    PLANNED,
    RUNS,
    SIZE,
    SPEED,
    answered,
    change,
    evaluated,
    write_answers,
    write_records,
)
from repository import HANG

from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.build import build_report, shown_samples
from vlmprune_jax.run.report.figures import figure_of
from vlmprune_jax.run.report.speed import bench_tables, speed_tables
from vlmprune_jax.run.report.tables import key_numbers, lead, tables_of
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.comparison import benchmark_rows, compare
from vlmprune_jax.run.workdir.groups import comparison_of_run
from vlmprune_jax.run.workdir.result import Costs, Run, Workload, read_result
from vlmprune_jax.run.workdir.samples import Samples, make_samples
from vlmprune_jax.run.workdir.steps import STEPS, Steps
from vlmprune_jax.run.workdir.tpu_plan import TpuPlan

UNCLEAR = "not measurable on this busy machine (repeats differ by {} %)"


def table_of(workdir):
    (table,) = tables_of(comparison_of_run(read_result(workdir)))
    return table


def page_of(workdir, **changes):
    """The page, perhaps with fields of the result replaced."""
    if changes:
        write_artefact(workdir / "result.json", replace(read_result(workdir), **changes))
    return build_report(workdir).read_text()


@pytest.mark.usefixtures("drawn")
def test_a_style_of_the_current_folder_is_not_obeyed(tmp_path):
    """`text.usetex` starts LaTeX; a FIFO would be waited for. The same figure gives the same text."""
    os.mkfifo(tmp_path / "matplotlibrc")
    code = "import vlmprune_jax.run.report.plots"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True, timeout=HANG)
    figure = plots.layer_importance_figure("title", np.array([1.0, 2.0]), [1])
    first = figure_of(figure, "", "")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "svg.fonttype": "none"}):
        assert figure_of(plots.layer_importance_figure("title", np.array([1.0, 2.0]), [1]), "", "") == first


def outside_of(page):
    """What a browser would fetch that is neither on the page nor in it."""
    attributes = r"""\s(?:src|href|xlink:href|srcset|data)=["']?([^"'\s>]+)"""
    found = re.findall(rf"""{attributes}|url\(["']?([^)"']+)|(@import)|<(link|iframe|object|embed|base|form)\b""", page)
    links = ["".join(groups) for groups in found]
    return [link for link in links if not link.startswith(("#", "data:image/"))]


@pytest.mark.usefixtures("drawn")
def test_page_tells_the_numbers_and_is_one_file(workdir):
    page = page_of(workdir)
    for text in ("depth-<wbr>sft", "76.00", "95.00", ">5</td>", "12.3", "3.2e-06", "Best of 3 models"):
        assert text in page
    assert "<h1>Structural pruning report</h1>" in page
    assert page.count("<svg") == 6  # accuracy, what two plans removed, two importances, losses
    assert outside_of(page) == []
    fetching = '<img src="https://a.b/c"><a href="#x">x</a><style>p { background: url(//d.e) }</style><link rel="x">'
    assert outside_of(fetching) == ["https://a.b/c", "//d.e", "link"]
    assert page.count("<script") == 1
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        used = re.findall(r'href="#([^"]+)|url\(#([^)]+)', svg)
        assert {one or other for one, other in used} <= set(re.findall(r'\bid="([^"]+)', svg)) != set()
    best = re.search(r'<tr class="best">(.*?)</tr>', page, re.S).group(1)
    assert "depth-<wbr>sft" in best
    assert "&lt;b&gt;" in page  # an answer is text, not markup
    assert "<b>" not in page
    assert list(workdir.glob(".*")) == [workdir / ".stages"]
    data = (workdir / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (880, 620)


def test_what_was_planned_for_a_slice_is_shown(workdir):
    assert "TPU slice" not in page_of(workdir)
    cached = {"images_buckets": [13], "feature_cache": True, "teacher": None, "teacher_top_k": 64}
    plan = TpuPlan(recoveries={"depth-sft": PLANNED, "<width>": replace(PLANNED, **cached)})
    write_artefact(workdir / "tpu_plan.json", plan)
    page = page_of(workdir)
    section = page[page.index("Recovery on a TPU slice") :]
    told, taught = (
        {html.unescape(what): value for what, value in re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', part)}
        for part in section.split("<h3>&lt;width&gt;</h3>")
    )
    assert told["step"] == "64 rows of 2,048 tokens and 1 image, 2 micro-batches, remat full"
    assert told["student"] == "5,700,000,000 parameters in 27 layers, teacher 7,000,000,000 in 32"
    assert taught["step"] == "64 rows of 2,048 tokens and 13 cached images, 2 micro-batches, remat full"
    assert taught["student"] == "5,700,000,000 parameters in 27 layers, the teacher&#39;s top 64 from its cache"
    assert told["HBM per chip"] == "2.00 GiB arguments + 1.50 GiB temporaries, 12.00 GiB free"
    assert told["FLOPs"].startswith("3.26e+15 executed, 2.51e+15 of the model")
    assert told["received"] == "per chip, in GiB: weights 37.00"
    assert told["step time"].endswith("(compute 0.258, memory 0.020, interconnect 0.190); MFU at most 77.1 %")
    assert told["buckets"] == "the largest of 768, 2048 tokens; smaller ones need less"
    assert told["run"].startswith("520 steps: at least 0.04 hours, 2.4 chip-hours if every batch is of the largest")
    assert told["throughput"] == "at most 508,031 tokens/s"
    (workdir / "tpu_plan.json").write_text("[]")
    refused(r"tpu_plan\.json: .*Expected `object`, got `array`\): run `vlmprune plan` again", build_report, workdir)


def test_titles_and_names(workdir):
    """The title names model and sets; names break at separators; a table without ratio and with nothing retained."""
    write_artefact(workdir / STEPS, Steps(model="org/<model>", sets="pope, mme", steps=[]))
    evaluation = replace(read_result(workdir).runs[0].evaluation, mean_of_ratios=None, retained={})
    change(workdir, 0, name="width_reconstructed-sft/a-", target_ratio=None, evaluation=evaluation)
    assert table_of(workdir).rows[1][:2] == ("depth 34 %", "")  # by what was reached
    page = page_of(workdir)
    assert page.count("Pruning of org/&lt;model&gt;, evaluated on pope, mme</") == 2
    assert ">width_<wbr>reconstructed-<wbr>sft/<wbr>a-</td>" in page


def test_a_model_that_two_variants_share_is_shown_once(workdir):
    """Width before reconstruction is the same model as width: one row, one answer, one figure."""
    result = read_result(workdir)
    twin = replace(result.runs[2], name="width_solved", reconstruct="least_squares", seconds=1.0)
    page = page_of(workdir, runs=[*result.runs, twin])
    shown = read_result(workdir).distinct()
    assert [run.name for run in shown.runs] == ["depth", "depth-sft", "width"]
    assert list(shown.labels.values()) == ["unpruned", "depth 30 %", "depth 30 %, SFT", "width 30 %"]
    assert "(width_solved)" not in page
    assert "Best of 3 models" in page
    other = replace(twin, evaluation=replace(twin.evaluation, mean_of_ratios=60.0))
    assert replace(result, runs=[*result.runs, other]).distinct().labels["width_solved"] == "width 30 % (width_solved)"
    best = replace(result, runs=[*result.runs, twin], best="width_solved").distinct()
    assert [run.name for run in best.runs] == ["depth", "depth-sft", "width_solved"]


def test_damaged_result(workdir):
    for text, message in (("{", "is not valid JSON"), ('{"format": 2, "sets": {}}', "sets")):
        (workdir / "result.json").write_text(text)
        refused(message, build_report, workdir)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_table(workdir):
    change(workdir, 1, decoder_ratio=0.4, speed=SPEED.medians()["depth"])
    table = table_of(workdir)
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
    page, table = page_of(workdir, controls=[control], runs=runs), table_of(workdir)
    place = table.header.index("of control, %")
    cells = {row[0]: (row[1], row[place]) for row in table.rows}
    assert cells["unpruned"] == ("100.00", "")
    assert cells["unpruned, SFT"] == ("118.75", "")
    assert cells["depth 30 %, SFT"] == ("95.00 (94.0 to 96.0)", "80.00 (78.0 to 82.0)")
    assert table.title.endswith(" (95 % intervals in brackets)")
    numbers = key_numbers(comparison_of_run(read_result(workdir)))
    assert numbers[:2] == [("retained", "95.00 % (94.0 to 96.0)"), ("of control", "80.00 % (78.0 to 82.0)")]
    assert "Of control: share of the score of the unpruned model after the same recovery" in page


def test_the_headline_has_retention_size_and_speed(workdir):
    costs = Costs(forward_flops=1e9, kv_bytes_per_token=10, file_bytes=2_000_000)
    change(workdir, 1, decoder_ratio=0.4, speed=SPEED.medians()["depth"], costs=costs)
    result = read_result(workdir)
    teacher = replace(result.teacher, costs=replace(costs, file_bytes=3_000_000), passthrough=1000)
    page = page_of(workdir, teacher=teacher)
    comparison = comparison_of_run(read_result(workdir))
    numbers = {"retained": "95.00 %", "size": "66.0 %", "decoding speed-up": UNCLEAR.format(10)}
    numbers["prompt speed-up"] = "1.50 (1.50 to 1.52)"
    assert dict(key_numbers(comparison)) == numbers
    assert lead(comparison) == "; ".join(["Best of 3 models: depth 30 %, SFT", *map(" ".join, numbers.items())])
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


def test_costs_are_told_beside_those_of_the_unpruned_model(several):
    result = read_result(several)
    before = Costs(forward_flops=4e12, kv_bytes_per_token=1000, file_bytes=8_000_000)
    after = Costs(forward_flops=3e12, kv_bytes_per_token=500, file_bytes=6_000_000)
    workload = Workload(length=640, images=1, dtype="bfloat16")
    runs, teacher = [replace(run, costs=after) for run in result.runs], replace(result.teacher, costs=before)
    page = page_of(several, workload=workload, teacher=teacher, runs=runs)
    for cell in ("4,000.000", "3,000.000", "1,000", "500", "7.63", "5.72"):
        assert f">{cell}</td>" in page
    assert "a forward pass of 640 tokens, those of 1 image(s) among them" in page


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_on_the_page(workdir):
    write_answers(workdir)
    said, scores = answered({"unpruned": range(30), "depth": range(20), "depth-sft": range(25)})
    said["depth"][20] = "\x1b[31m<script>alert(1)</script>"
    found = make_samples(write_records(workdir), RUNS[:2], said, scores, max_pixels=10**6)
    write_artefact(workdir / "eval/samples.json", Samples(sets={"questions": found}))
    page = page_of(workdir)
    headings = ("Broken by pruning, repaired by recovery (5 of 40)", "Broken by pruning, and still wrong (5 of 40)",
                "Other questions (30 of 40)")  # fmt: skip
    assert re.findall(r"<h3>(.*?)</h3>", page)[:3] == [*headings]
    assert "<script>alert" not in page
    assert html.escape("\\x1b[31m<script>alert(1)</script>") in page
    assert page.count("<img ") == 11
    assert all(re.search(r' alt="[^"]+"', tag) for tag in re.findall(r"<img [^>]*>", page))
    (workdir / "eval/samples.json").unlink()
    told = f"No questions were kept for this page: <code>vlmprune evaluate --config=FILE.py --workdir={workdir}"
    assert told in page_of(workdir)


def test_scores_between_right_and_wrong(tmp_path):
    records = write_records(tmp_path)
    scores = {"unpruned": [0.9] * 40, "depth": [0.3] * 20 + [None] * 20, "depth-sft": [0.6] * 40}
    found = make_samples(records, RUNS[:2], {name: ["x"] * 40 for name in scores}, scores, max_pixels=10**6)
    assert found.counts == {"repaired": 40, "broken": 0, "other": 0}
    labels = {"unpruned": "unpruned", "depth": "depth 30 %", "depth-sft": "depth 30 %, SFT"}
    _, answers = next(shown_samples(found, labels))[1][0]
    assert answers == [("x", "right", "unpruned; depth 30 %, SFT"), ("x", "wrong", "depth 30 %")]
    del labels["depth"]  # a model that another one equals
    assert [verdict for _, verdict, _ in next(shown_samples(found, labels))[1][0][1]] == ["right"]


# --- what the report says of measured speed --------------------------------------------------------------------------


def test_speed_is_told_with_its_range_and_where_it_was_measured(workdir):
    page = page_of(workdir)
    assert "Speed was not measured: <code>vlmprune run --config=FILE.py" in page
    assert "--config.speed.rounds=5" in page
    write_artefact(workdir / "speed.json", SPEED)
    page = page_of(workdir)
    assert "Speed was not measured" not in page
    assert "Measured on Some &lt;b&gt;CPU (load 0.5 before): 1 row(s) of 640 tokens, an image first" in page
    labels = {"depth": "depth 30 %", "depth-sft": "depth 30 %, SFT"}
    times, table = speed_tables(SPEED, labels)
    unpruned, pruned = table.rows
    assert unpruned == ("unpruned", "100 (98 to 103)", "20 (19 to 21)", "200 (100 to 300)", "1.0")
    assert pruned[:2] == ("depth 30 % (and 1 of its shape)", "150 (149 to 155)")
    assert pruned[4] == ""
    assert times.rows == (("depth 30 % (and 1 of its shape)", "1.50 (1.50 to 1.52)", UNCLEAR.format(10)),)


def test_a_card_tells_speeds_behind_the_scores(workdir):
    result = read_result(workdir)
    run, teacher, sets = result.runs[0], result.teacher, result.sets
    assert len(benchmark_rows(run, teacher, sets)) == len(sets)
    speeds = SPEED.medians()
    rows = benchmark_rows(replace(run, speed=speeds["depth"]), replace(teacher, speed=speeds[""]), sets)[len(sets) :]
    assert [row[1:] for row in rows] == [
        ("100", "150", "1.50 (1.50 to 1.52) times as fast", ""),
        ("", "", UNCLEAR.format(10), ""),
    ]
    assert rows[1][0] == "generated tokens per second, vlmprune's JAX forward pass on this run's machine"


def test_a_bench_in_the_workdir_is_told(workdir):
    write_artefact(workdir / "bench.json", BENCH)
    page = page_of(workdir)
    assert "Times as fast: ratio of medians (interval over rounds)" in page
    assert "a process of its own with 2 thread(s)" in page
    times = bench_tables(BENCH)[2]
    assert times.rows == (("pruned", "llama_cpp", "teacher", "1.50 (1.50 to 1.52)", "not measurable"),)
    noisy = [replace(BENCH.sides[0], decode=(10.0, 4.0, 18.6)), replace(BENCH.sides[1], decode=(51.0, 50.0, 51.5))]
    assert bench_tables(replace(BENCH, sides=noisy))[2].rows[0][4] == "not measurable"


def test_no_place_shows_a_speedup_of_a_busy_machine(workdir):
    """Headline, tables, key numbers, figure, card and page, of rounds that differ by 146 %."""
    speeds = NOISY.medians()
    write_artefact(workdir / "speed.json", NOISY)
    change(workdir, 1, speed=speeds["depth"])
    result = read_result(workdir)
    numbers = key_numbers(comparison_of_run(result))
    assert numbers[-2:] == [("decoding speed-up", UNCLEAR.format(146)), ("prompt speed-up", UNCLEAR.format(140))]
    table = table_of(workdir)
    assert table.rows[2][table.header.index("decoding, x")] == "not measurable"
    rows = benchmark_rows(result.best_run, result.teacher, result.sets)[1:]
    assert [row[1:] for row in rows] == [("", "", UNCLEAR.format(140), ""), ("", "", UNCLEAR.format(146), "")]
    page = re.sub(r"(?s)<svg.*?</svg>|<pre.*?</pre>", "", page_of(workdir))
    assert UNCLEAR.format(146) in page
    shown = f"{table.rows} {numbers} {rows} {speed_tables(NOISY)[0].rows} {page}"
    for claim in ("5.10", "7.22", "510", "722.00"):
        assert claim not in shown
