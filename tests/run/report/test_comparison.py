"""The comparison of a sweep: what is drawn together, the page with one set and with several, damage."""

import html
import json
import re

import pytest
from msgspec.structs import replace
from sweep_cases import image_runs, some_runs, with_models, write_sweep

from vlmprune_jax.run.report import figures
from vlmprune_jax.run.report.build import build_sweep_page
from vlmprune_jax.run.report.tables import tables_of
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.groups import comparison_of_sweep
from vlmprune_jax.run.workdir.speed import SpeedUp
from vlmprune_jax.run.workdir.sweep import as_csv, read_sweep


def tables_of_sweep(sweep):
    return tables_of(comparison_of_sweep(sweep), runs=True)


@pytest.mark.parametrize("sets", [("docs",), ("docs", "mme", "wiki")])
def test_page(tmp_path, sets):
    write_sweep(tmp_path, sets)
    page = build_sweep_page(tmp_path).read_text()
    # costs, speeds; over the ratio of 0, 5 and 20 % of the data; over the data of depth and of width
    assert page.count("<svg") == 7
    assert page.count('role="img" aria-label="') == 7
    outside = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!#)(\w+:[^"\')]+)', page)
    assert [link for link in outside if not link.startswith("data:") and "www.w3.org" not in link] == []
    lead = html.unescape(page).replace("\u00a0", " ")
    assert "Best of 12 models: depth 10 %, SFT, 5 % of the data; retained" in lead
    assert "method=depth,ratio=0.1,recovery=sft,fraction=0.05" in page
    assert "<dt>decoding speed-up</dt><dd>1.33 (1.28 to 1.39)</dd>" in lead
    assert "20 of 20 runs are done: 20 models." in page
    assert list(tmp_path.glob(".*")) == []


def test_speeds_of_a_busy_machine_are_not_shown(tmp_path):
    """Of rounds that differ by 146 % no ratio is in table, sentences, figures and CSV."""
    busy = SpeedUp(5.1, 4.77, 5.43, 1.46)
    sweep = with_models(write_sweep(tmp_path), speed=lambda one: replace(one.found.speed, decode_speedup=busy))
    write_artefact(tmp_path / "sweep.json", sweep)
    page = build_sweep_page(tmp_path).read_text().replace("\u00a0", " ")
    reason = "not measurable on this busy machine (repeats differ by 146 %)"
    assert f"; decoding speed-up {reason}; " in page
    table, *_ = tables_of_sweep(sweep)
    assert {row[table.header.index("decoding, x")] for row in table.rows} == {"1.00", "not measurable"}
    assert not re.search(r"\b(5\.10?|4\.77|5\.43)\b", f"{table.rows}{as_csv(sweep)}")
    assert page.count("<svg") == 6


def test_the_table_of_terminal_and_page(tmp_path):
    """Groups of seeds have one row with their spread; what a person looks for comes first."""
    table, *_ = tables_of_sweep(write_sweep(tmp_path))
    first = ("model", "retained, %", "of control, %", "size, %", "paper avg, %", "decoding, x")
    assert table.header[:6] == first
    seeds = table.header.index("seeds")
    assert len(table.rows) == 13
    assert table.rows[0][:4] == ("unpruned", "100.00", "", "100.0")
    assert (table.rows[1][0], table.rows[1][2], table.rows[1][seeds]) == ("depth 10 %", "", "1")
    assert (table.rows[2][0], table.rows[2][seeds]) == ("depth 10 %, SFT, 5 % of the data", "2")
    retained, low, high = map(float, re.fullmatch(r"(.*) \((.*) to (.*)\)", table.rows[2][1]).groups())
    assert low < retained < high
    assert 0 < float(table.rows[2][2].split()[0]) < retained  # the control is better than the unpruned model
    assert "(95 % intervals in brackets)" in table.title


def test_the_best_is_told_as_in_the_report_of_one_run(tmp_path):
    """Intervals are over questions where there is one seed."""
    sweep = write_sweep(tmp_path, ("docs",), runs=some_runs(seeds=(1,)))
    kept = {entry.name: 100 - 0.42 * number for number, entry in enumerate(sweep.models)}

    def measured(entry):
        share = kept[entry.name]
        changes = {"retained": {"docs": share}, "mean_of_ratios": share, "control": None}
        return replace(entry.found.evaluation, **changes, retained_interval={"docs": (share - 1, share + 0.5)})

    write_artefact(tmp_path / "sweep.json", with_models(sweep, evaluation=measured))
    page = html.unescape(build_sweep_page(tmp_path).read_text()).replace("\u00a0", " ")
    assert "<dt>retained</dt><dd>100.00 % (99.0 to 100.5)</dd>" in page
    assert re.search(r'<tr class="best">\s*<th scope="row">depth', page)
    (table,) = tables_of_sweep(read_sweep(tmp_path))
    assert table.rows[2][table.header.index("retained, %")] == "99.58 (98.6 to 100.1)"


def test_accuracy_over_the_tokens_per_image(tmp_path):
    """Each limit has its own unpruned model."""
    sweep = write_sweep(tmp_path, runs=image_runs())
    assert [one.image_tokens for one in sweep.done] == [70, 140, 280]
    assert sorted(sweep.unpruned) == sorted(f" at {one} tokens per image" for one in (70, 140, 280))
    unpruned = [row[0] for row in tables_of_sweep(sweep)[0].rows[:3]]
    assert unpruned == [f"unpruned, {tokens} image tokens" for tokens in (280, 140, 70)]
    page = build_sweep_page(tmp_path).read_text()
    assert "depth 10 %, 140 image tokens" in html.unescape(page).replace("\u00a0", " ")
    assert "image_tokens" in as_csv(sweep).splitlines()[0].split(",")
    one = replace(sweep, unpruned={" at 70 tokens per image": sweep.unpruned[" at 70 tokens per image"]})
    assert "there are no results of ' at 140 tokens per image'" in one.problems(tmp_path)


@pytest.mark.parametrize(("seeds", "drawn"), [(2, False), (3, True)])
def test_intervals_are_drawn_from_three_seeds_on(tmp_path, monkeypatch, seeds, drawn):
    drawn_figures, figure_of = [], figures.figure_of
    monkeypatch.setattr(
        figures, "figure_of", lambda figure, *of: drawn_figures.append(figure) or figure_of(figure, *of)
    )
    write_sweep(tmp_path, ("docs",), runs=image_runs((70, 140), range(seeds)))
    build_sweep_page(tmp_path)
    bars = [
        line for line in drawn_figures[0].axes[0].lines if len(line.get_xdata()) == 2 and len({*line.get_xdata()}) == 1
    ]
    assert len(bars) == 2 * drawn  # a bar per limit


@pytest.mark.usefixtures("drawn")
def test_names_of_anybody_are_text(tmp_path):
    write_sweep(tmp_path, runs=some_runs(seeds=(1,)))
    found = (tmp_path / "sweep.json").read_text()
    found = found.replace('"sft"', json.dumps("<b>$x^</b>\x1b[2J")).replace("made_up.py", "<img src=http://x>")
    (tmp_path / "sweep.json").write_text(found.replace("method=depth", "<script>alert(1)</script>"))
    page = build_sweep_page(tmp_path).read_text()
    assert not [mark for mark in ("<script>alert", "<img", "<b>", "\x1b") if mark in page]


def test_failed_and_pending_runs_are_told(tmp_path):
    sweep = write_sweep(tmp_path, ("docs",))
    for place, error in enumerate(("no <such> thing", None)):
        sweep.models[place] = replace(sweep.models[place], found=None, error=error)
    write_artefact(tmp_path / "sweep.json", sweep)
    page = build_sweep_page(tmp_path).read_text()
    assert "18 of 20 runs are done (1 failed, 1 pending): 18 models." in page
    assert "no &lt;such&gt; thing" in page
    lines = as_csv(sweep).splitlines()
    assert len(lines) == 21
    assert ",failed,no <such> thing," in lines[1]


@pytest.mark.usefixtures("drawn")
def test_models_of_which_nothing_can_be_said(tmp_path):
    """The unpruned model scores 0 where these have no share of it, or one that no axis has a place for."""
    sweep = write_sweep(tmp_path, ("docs",), runs=some_runs(seeds=(1,)))
    values = {sweep.models[0].name: None, sweep.models[1].name: 1e200}

    def averaged(one):
        return replace(one.found.evaluation, mean_of_ratios=values.get(one.name, one.found.evaluation.mean_of_ratios))

    write_artefact(tmp_path / "sweep.json", with_models(sweep, evaluation=averaged))
    build_sweep_page(tmp_path)
    values = dict.fromkeys(one.name for one in sweep.models)
    write_artefact(tmp_path / "sweep.json", with_models(sweep, evaluation=averaged))
    page = build_sweep_page(tmp_path).read_text()
    assert "<svg" not in page
    assert "method=width,ratio=0.3" in page
