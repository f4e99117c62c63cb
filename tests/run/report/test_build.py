"""The report page: what it says, that it is one file, its samples, and what it does with a damaged workdir."""

import html
import os
import re
import struct
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from answer_cases import RUNS, answered, write_records
from msgspec.structs import replace
from refusal import refused
from report_cases import PLANNED, change, write_answers
from repository import HANG

from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.build import build_report, shown_samples
from vlmprune_jax.run.report.figures import figure_of
from vlmprune_jax.run.report.tables import tables_of
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.groups import comparison_of_run
from vlmprune_jax.run.workdir.result import read_result
from vlmprune_jax.run.workdir.samples import Samples, make_samples
from vlmprune_jax.run.workdir.steps import STEPS, Steps
from vlmprune_jax.run.workdir.tpu_plan import TpuPlan


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


def test_page_tells_the_numbers_and_is_one_file(finished):
    page = (finished / "report.html").read_text()
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
    assert list(finished.glob(".*")) == [finished / ".stages"]
    data = (finished / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (880, 620)


def test_what_was_planned_for_a_slice_is_shown(workdir):
    assert "TPU slice" not in build_report(workdir).read_text()
    cached = {"images_buckets": [13], "feature_cache": True, "teacher": None, "teacher_top_k": 64}
    plan = TpuPlan(recoveries={"depth-sft": PLANNED, "<width>": replace(PLANNED, **cached)})
    write_artefact(workdir / "tpu_plan.json", plan)
    page = build_report(workdir).read_text()
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
    """The title names model and sets; names break at separators."""
    write_artefact(workdir / STEPS, Steps(model="org/<model>", sets="pope, mme", steps=[]))
    change(workdir, 0, name="width_reconstructed-sft/a-")
    page = build_report(workdir).read_text()
    assert page.count("Pruning of org/&lt;model&gt;, evaluated on pope, mme</") == 2
    assert ">width_<wbr>reconstructed-<wbr>sft/<wbr>a-</td>" in page


def test_a_model_that_two_variants_share_is_shown_once(workdir):
    """Width before reconstruction is the same model as width: one row, one answer, one figure."""
    result = read_result(workdir)
    twin = replace(result.runs[2], name="width_solved", reconstruct="least_squares", seconds=1.0)
    write_artefact(workdir / "result.json", replace(result, runs=[*result.runs, twin]))
    shown = read_result(workdir).distinct()
    assert [run.name for run in shown.runs] == ["depth", "depth-sft", "width"]
    assert list(shown.labels.values()) == ["unpruned", "depth 30 %", "depth 30 %, SFT", "width 30 %"]
    page = build_report(workdir).read_text()
    assert "(width_solved)" not in page
    assert "Best of 3 models" in page
    other = replace(twin, evaluation=replace(twin.evaluation, mean_of_ratios=60.0))
    write_artefact(workdir / "result.json", replace(result, runs=[*result.runs, other]))
    assert read_result(workdir).distinct().labels["width_solved"] == "width 30 % (width_solved)"
    best = replace(result, runs=[*result.runs, twin], best="width_solved").distinct()
    assert [run.name for run in best.runs] == ["depth", "depth-sft", "width_solved"]


def test_no_ratio_and_nothing_retained(workdir):
    evaluation = replace(read_result(workdir).runs[0].evaluation, mean_of_ratios=None, retained={})
    change(workdir, 0, target_ratio=None, evaluation=evaluation)
    (table,) = tables_of(comparison_of_run(read_result(workdir)))
    assert table.rows[1][0] == "depth 34 %"  # by what was reached
    assert table.rows[1][1] == ""
    build_report(workdir)


def test_damaged_result(workdir):
    for text, message in (("{", "is not valid JSON"), ('{"format": 2, "sets": {}}', "sets")):
        (workdir / "result.json").write_text(text)
        refused(message, build_report, workdir)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_on_the_page(workdir):
    write_answers(workdir)
    said, scores = answered({"unpruned": range(30), "depth": range(20), "depth-sft": range(25)})
    said["depth"][20] = "\x1b[31m<script>alert(1)</script>"
    found = make_samples(write_records(workdir), RUNS[:2], said, scores, max_pixels=10**6)
    write_artefact(workdir / "eval/samples.json", Samples(sets={"questions": found}))
    page = build_report(workdir).read_text()
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert headings[:3] == [
        "Broken by pruning, repaired by recovery (5 of 40)",
        "Broken by pruning, and still wrong (5 of 40)",
        "Other questions (30 of 40)",
    ]
    assert "<script>alert" not in page
    assert html.escape("\\x1b[31m<script>alert(1)</script>") in page
    assert page.count("<img ") == 11
    assert all(re.search(r' alt="[^"]+"', tag) for tag in re.findall(r"<img [^>]*>", page))
    (workdir / "eval/samples.json").unlink()
    assert f"No questions were kept for this page: <code>vlmprune evaluate --config=FILE.py --workdir={workdir}" in (
        build_report(workdir).read_text()
    )


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
