"""The report page: what it says, that it is one file, and what it does with a damaged workdir."""

import dataclasses
import html
import html.parser
import os
import re
import struct
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from msgspec.structs import replace
from report_cases import PLANNED, SIZE, SPEED, evaluated, write_several, write_workdir

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.prune import Scores
from vlmprune_jax.report import plots
from vlmprune_jax.report.build import build_report
from vlmprune_jax.report.tables import key_numbers, lead, tables_of
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.comparison import compare
from vlmprune_jax.workdir.result import Control, Costs, Workload, read_result
from vlmprune_jax.workdir.tpu_plan import Planned, TpuPlan


@pytest.fixture
def workdir(tmp_path):
    write_workdir(tmp_path)
    return tmp_path


def change(workdir, run, **changes):
    """Replace fields of a run of the result, by its number."""
    result = read_result(workdir)
    result.runs[run] = replace(result.runs[run], **changes)
    write_artefact(workdir / "result.json", result)


def test_a_style_of_the_current_folder_is_not_obeyed(workdir, tmp_path):
    """`text.usetex` starts LaTeX; a FIFO would be waited for."""
    (tmp_path / "here").mkdir()
    os.mkfifo(tmp_path / "here/matplotlibrc")
    code = "import vlmprune_jax.report.plots"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path / "here", check=True, timeout=60)
    first = build_report(workdir).read_text()
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "svg.fonttype": "none"}):
        assert build_report(workdir).read_text() == first


class _Links(html.parser.HTMLParser):
    """Whatever a browser might fetch of a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.found += [link for name, value in attrs for link in re.findall(r"url\(([^)]*)", value or "")]
        if tag in ("link", "iframe", "object", "embed", "base", "form"):
            self.found.append(tag)

    def handle_data(self, data):
        self.found += re.findall(r"url\(([^)]*)|@import", data)


def outside_of(page):
    """What of it is neither on the page nor in it."""
    links = _Links()
    links.feed(page)
    return [link for link in links.found if not link.startswith(("#", "data:image/"))]


def test_links_are_found():
    page = '<img src="https://a.b/c.png"><a href="#x">x</a><style>p { background: url(//d.e) }</style><link rel="x">'
    assert outside_of(page) == ["https://a.b/c.png", "//d.e", "link"]


def test_page_tells_the_numbers_and_is_one_file(workdir):
    page = build_report(workdir).read_text()
    for text in ("depth-sft", "76.00", "95.00", "5 %", "12.3", "3.2e-06", "Best of 3 models"):
        assert text in page
    assert page.count("<svg") == 6  # accuracy, what two plans removed, two importances, losses
    assert outside_of(page) == []
    assert page.count("<script") == 1
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        used = re.findall(r'href="#([^"]+)|url\(#([^)]+)', svg)
        assert {one or other for one, other in used} <= set(re.findall(r'\bid="([^"]+)', svg)) != set()
    best = re.search(r'<tr class="best">(.*?)</tr>', page, re.S).group(1)
    assert "depth-sft" in best
    assert "&lt;b&gt;" in page  # an answer is text, not markup
    assert "<b>" not in page
    assert list(workdir.glob(".*")) == [workdir / ".stages"]


def test_kinds_of_tokens_and_what_serves_vision(workdir):
    assert "by kind of token" not in build_report(workdir).read_text()
    path = workdir / "depth" / "scores.npz"
    of = {
        kind: {"importance": np.array(v)} for kind, v in (("image", [1, 1, 6, 1, 1.0]), ("prompt", [2, 2, 2, 2, 2.0]))
    }
    dataclasses.replace(Scores.load(path), by_kind=of).save(path)
    page = build_report(workdir).read_text()
    assert page.count("<svg") == 7
    assert "Serve vision most: layers 2 (0.75). In brackets" in page  # 0.6 of images, 0.2 of text
    path = workdir / "width" / "scores.npz"
    scores = Scores.load(path)
    weighted = tuple(h * (1 + 9 * (i == 3)) for i, h in enumerate(scores.heads))
    parts = {"heads": scores.heads, "mlp": scores.mlp}
    dataclasses.replace(scores, by_kind={"image": {**parts, "heads": weighted}, "answer": parts}).save(path)
    told = re.search(
        r"width/scores.npz. Serve vision most: layers none; heads (.*?)\. In", build_report(workdir).read_text()
    )
    assert [one.split()[0][0] for one in told.group(1).split(", ")] == ["3"] * 4


def test_what_was_planned_for_a_slice_is_shown(workdir):
    assert "TPU" not in build_report(workdir).read_text()
    search = Planned(problem="12 GiB too many", search={"slice": PLANNED})
    plan = TpuPlan(recoveries={"depth-sft": Planned(step=PLANNED), "<width>": search})
    write_artefact(workdir / "tpu_plan.json", plan)
    page = build_report(workdir).read_text()
    section = page[page.index("Recovery on a TPU slice") :]
    told = {
        html.unescape(what): value for what, value in re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', section)
    }
    assert told["HBM per chip"] == "2.00 GiB arguments + 1.50 GiB temporaries, 12.00 GiB free"
    assert told["FLOPs"].startswith("3.26e+15 executed, 2.51e+15 of the model")
    assert told["received"] == "per chip, in GiB: all-gather 37.00"
    assert told["step time"].endswith("(compute 0.258, memory 0.020, interconnect 0.190); MFU at most 77.1 %")
    assert told["buckets"] == "the largest of 768, 2048 tokens; smaller ones need less"
    assert told["run"].startswith(
        "520 steps: at least 0.04 hours, 2.4 chip-hours if every batch is of the largest bucket"
    )
    assert told["does not fit"] == "12 GiB too many"
    assert told["best slice"] == (
        "64 rows in 2, remat full, on v5e:8x8: 12.00 GiB free, at least 0.258 s a step, 254,000 tokens/s"
    )
    assert "<h3>&lt;width&gt;</h3>" in section
    (workdir / "tpu_plan.json").write_text("[]")
    with pytest.raises(
        UserError,
        match=r"tpu_plan\.json: .*Expected `object`, got `array`\): run `vlmprune plan` again",
    ):
        build_report(workdir)


def test_plot_is_a_png_of_its_size(workdir):
    build_report(workdir)
    data = (workdir / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1840, 780)


def test_the_same_result_gives_the_same_page(workdir):
    first = build_report(workdir).read_bytes()
    assert build_report(workdir).read_bytes() == first


def test_table(workdir):
    change(workdir, 1, decoder_ratio=0.4, speed=SPEED.medians()["depth"])
    (table,) = tables_of(read_result(workdir))
    assert table.header[:3] == ("model", "retained, %", "size, %")
    assert table.header[: table.first] == ("model", "retained, %", "size, %", "decoding, x")
    assert all(len(row) == len(table.header) for row in table.rows)
    unpruned, depth, recovered, _ = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert (unpruned["accuracy, %"], unpruned["retained, %"], unpruned["size, %"]) == ("80.00", "100.00", "100.0")
    assert (depth["model"], depth["data, %"], depth["accuracy, %"]) == ("depth 30 %", "", "25.00")
    assert depth["retained, %"] == "31.25"
    assert (recovered["model"], recovered["data, %"], recovered["retained, %"]) == ("depth 30 %, SFT", "5", "95.00")
    assert recovered["decoding, x"] == "0.98"
    assert recovered["removed, % (of decoder)"].endswith(" (40.0)")


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


def test_retention_beside_a_control(workdir):
    """The unpruned model was trained as well: its row, and what the recovered model retains of it."""
    result, evaluations = read_result(workdir), {"questions": evaluated(0.95)}
    teacher = {"questions": evaluated(0.8)}
    control = Control(
        name="control-sft", recovery="sft", data_fraction=0.05, seconds=9.5, path="control/sft/recovered",
        evaluation=compare(evaluations, teacher),
    )  # fmt: skip
    recovered = compare({"questions": evaluated(0.76)}, teacher, evaluations)
    runs = [replace(run, evaluation=recovered) if run.name == "depth-sft" else run for run in result.runs]
    result = replace(result, controls=[control], runs=runs)
    write_artefact(workdir / "result.json", result)
    (table,) = tables_of(result)
    place = table.header.index("of control, %")
    cells = {row[0]: (row[1], row[place]) for row in table.rows}
    assert cells["unpruned"] == ("100.00", "")
    assert cells["unpruned, SFT"] == ("118.75", "")
    assert cells["depth 30 %, SFT"] == ("95.00", "80.00")
    assert "retains 80.00 % of the score of the unpruned model after the same recovery, and 95.00 % of the" in lead(
        result
    )
    assert ("of control", "80.00 %") in key_numbers(result)
    page = build_report(workdir).read_text()
    assert "Of control: share of the score of the unpruned model after the same recovery" in page


def test_the_headline_has_retention_size_and_speed(workdir):
    costs = Costs(forward_flops=1e9, kv_bytes_per_token=10, file_bytes=2_000_000)
    change(workdir, 1, decoder_ratio=0.4, speed=SPEED.medians()["depth"], costs=costs)
    result = read_result(workdir)
    teacher = replace(result.teacher, costs=replace(costs, file_bytes=3_000_000), carried=1000)
    write_artefact(workdir / "result.json", replace(result, teacher=teacher))
    told = lead(read_result(workdir))
    assert "depth 30 %, SFT (trained on 5 % of the data) retains 95.00 % of the unpruned score" in told
    assert "40.0 % of the decoder; 3 to 2 MB)" in told
    assert told.endswith("It decodes 0.98 times and reads prompts 1.50 times as fast.")
    page = build_report(workdir).read_text()
    assert re.findall(r"<dt>(.*?)</dt>", page) == ["retained", "size", "decoding speed", "prompt speed"]
    assert f"also counts 1,000 in tower layers after the feature layer ({SIZE + 1000:,} unpruned)" in page


# --- several evaluation sets, with metrics that nothing here has ever heard of ----------------------------------------


@pytest.fixture
def several(workdir):
    write_several(workdir)
    return workdir


def test_tables_of_several_sets(several):
    summary, scores, kept = tables_of(read_result(several))
    assert summary.header[:4] == ("model", "retained, %", "size, %", "paper avg, %")
    # docs 50 %, mme 80 %; in the paper's average 0.4 + 0.6 of 0.8 + 0.75
    assert [(row[1], row[3]) for row in summary.rows[:2]] == [("100.00", "100.00"), ("65.00", "64.52")]
    assert scores.ascending == ("wiki",)
    assert scores.title == "docs: anls in %, mme: perception, wiki: bits in bit"
    assert scores.rows[1] == ("depth 30 %", "40.00", "1200.00", "2.00")
    assert kept.rows[0] == ("depth 30 %", "50.00", "80.00", "50.00")
    assert kept.header == ("model", "docs", "mme", "wiki")


def test_page_of_several_sets(several):
    page = build_report(several).read_text()
    assert page.count("<svg") == 9  # the average, three sets, what two plans removed, two importances, losses
    for text in (
        "retains 82.50 % of the unpruned score on average over 2 evaluation sets",
        "Lower is better",
    ):
        assert text in page
    assert "accuracy" not in page.lower().split("<summary>")[0]


def test_figures_separate_models(several):
    """Rows are in the order of retention, and 99.0, 99.8 and 99.9 % are apart on an axis that has 26 % as well."""
    runs = read_result(several)
    kept = [100.0, 99.8, 99.9, 26.0]
    measured = plots.Measured("Retained", "t", "retained (%)", kept, [None, None, (99.7, 100.0), None], retention=True)
    points, rows = plots.score_figure(runs, measured).axes
    places = [points.transData.transform((1.0, value))[1] for value in (99.0, 99.8, 99.9, 100.0)]
    height = points.bbox.height
    assert min(np.diff(places)) > 0.04 * height
    assert points.get_ylim()[0] < 26 < 100 < points.get_ylim()[1]
    assert [text.get_text() for text in rows.texts] == ["99.90", "99.80", "26.00"]
    values = plots.Measured("Bits", "t", "bits (bit)", [1.0, 2.0, 1.25, np.inf])
    points, rows = plots.score_figure(runs, values).axes
    assert points.get_ylim()[0] > 0.9  # as far as there are values
    assert rows.texts[-1].get_text() == "inf"


def test_no_ratio_and_nothing_retained(workdir):
    evaluation = replace(read_result(workdir).runs[0].evaluation, mean_of_ratios=None)
    change(workdir, 0, ratio_asked=None, evaluation=evaluation)
    (table,) = tables_of(read_result(workdir))
    assert table.rows[1][0] == "depth 34 %"  # by what was reached
    assert table.rows[1][1] == ""
    build_report(workdir)


def test_importance_figures_mark_what_goes(workdir):
    scores = Scores.load(workdir / "depth" / "scores.npz")
    figure = plots.layer_importance_figure("t", scores.importance, [4, 3])
    kept, removed = figure.axes[0].containers
    assert [round(bar.get_center()[0]) for bar in removed] == [3, 4]
    assert [bar.get_height() for bar in removed] == pytest.approx([0.2, 0.1])
    assert len(kept) == 3
    heads = [np.array([1.0, 2.0]), np.array([4.0, 1.0])]
    figure = plots.width_importance_figure("t", heads, {0: ({1}, 6, 12), 1: ({0, 1}, 12, 12)})
    crosses = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines if len(line.get_xdata())]
    assert crosses == [(0, 0)]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [50.0, 100.0]


def test_loss_figure():
    titles = {"ce": "cross-entropy", "l2": "hidden states", "mine": "of my own"}
    assert plots.loss_figure({"a": [{"step": 1, "grad_norm": 2.0}]}, titles) is None
    one, two = [{"step": 1, "ce": 2.0}, {"step": 2, "ce": 1.0}], [{"step": 1, "mine": 1.0}]
    figure = plots.loss_figure({"a": one, "b": two}, titles)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "cross-entropy, training batches",
        "of my own, training batches",
    ]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [2.0, 1.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is not valid JSON"), ("{", "is not valid JSON"), ('{"format": 1, "sets": {}}', "sets")],
)
def test_damaged_result(workdir, text, message):
    (workdir / "result.json").write_text(text)
    with pytest.raises(UserError, match=message):
        build_report(workdir)


def test_it_says_what_the_guide_recommends_for_the_cut_of_the_best_run(workdir):
    change(workdir, 1, ratio_reached=0.27, decoder_ratio=0.3, data_fraction=0.05)
    result = read_result(workdir)
    workload = Workload(length=640, images=1, dtype="bfloat16")
    write_artefact(workdir / "result.json", replace(result, workload=workload))
    text = re.sub(r"<[^>]+>", " ", build_report(workdir).read_text())
    told = text.partition("What the guide recommends")[2]
    assert "27 % of all parameters (30 % of the decoder), with the data it was trained on" in told
    assert "Recommended: remove whole layers by Block Influence; then train adapters and projector" in told
    write_artefact(workdir / "result.json", result)
    assert "What the guide recommends" not in build_report(workdir).read_text()
