"""Damaged and hostile files of a workdir: a page, or one line that names the file; never anything else."""

import io
import json
import os
import warnings

import numpy as np
import pytest
from fuzz_cases import mutants
from refusal import refused
from report_cases import CFG
from rich.console import Console

from vlmprune_jax.base import console
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.prune import PrunePlan, Scores
from vlmprune_jax.core.recovery.metrics import read_metrics
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.build import build_report
from vlmprune_jax.run.report.figures import importance_figure
from vlmprune_jax.run.report.tables import tables_of
from vlmprune_jax.run.workdir.comparison import best_run
from vlmprune_jax.run.workdir.groups import comparison_of_run
from vlmprune_jax.run.workdir.result import read_result


def printed(workdir):
    """What a person sees of a workdir's result."""
    result, out = read_result(workdir), io.StringIO()
    reporter = Reporter(Console(file=out, width=120))
    for table in tables_of(comparison_of_run(result)):
        reporter.table(*table.printed)
    best_run(result.runs, result.sets)
    return out.getvalue()


def refused_or_done(good, write, use, path, share):
    """How many of the mutants of a value were refused, each in one line that names the file, and how many taken."""
    counts = {True: 0, False: 0}
    for where, value in mutants(good, share):
        write(value)
        said = str(path)
        try:
            use()
        except UserError as error:
            said = str(error)
            counts[False] += 1
        except BaseException as error:
            raise AssertionError(f"{where} raises {error!r}") from error
        else:
            counts[True] += 1
        assert said.startswith(str(path)), (where, said)
        assert len(said) < 1000, where
    return counts


def test_mutants_of_plans_and_scores(workdir):
    for method in ("depth", "width"):
        plan, scores = workdir / method / "plan.json", workdir / method / "scores.npz"
        with np.load(scores) as file:
            arrays = {name: file[name] for name in file.files}
        good = Scores.load(scores)

        def use_plan(plan=plan, good=good):
            read = PrunePlan.from_json(plan)
            assert PrunePlan.from_json(read.to_json()) == read
            importance_figure(good, read)

        def write_meta(value, scores=scores, arrays=arrays):
            np.savez(scores, **{**arrays, "meta": np.array(json.dumps(value))})

        def use_scores(scores=scores, method=method, good=good):
            read = Scores.load(scores)
            if read.fingerprint == good.fingerprint:
                make_plan(read, CFG, method=method, ratio=0.3)

        data = json.loads(plan.read_text())
        counts = refused_or_done(data, lambda v, plan=plan: plan.write_text(json.dumps(v)), use_plan, plan, 0.2)
        assert counts[False] > 100
        refused_or_done(json.loads(str(arrays["meta"])), write_meta, use_scores, scores, 1.0)


def test_mutants_of_metrics(workdir):
    path = workdir / "depth/sft/metrics.jsonl"
    rows = read_metrics(path)[:2]

    def write(value):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in (value if isinstance(value, list) else [value])))

    def draw():
        plots.loss_figure({"a": read_metrics(path)}, {"ce": "cross-entropy", "l2": "states"})

    assert min(refused_or_done(rows, write, draw, path, 0.5).values()) > 5


@pytest.mark.parametrize("outside", ["../../etc/passwd", "/etc/passwd", "a\0b", "link", "depth/../../x", "\ud800"])
def test_a_result_names_no_file_outside_its_workdir(workdir, outside):
    (workdir / "link").symlink_to("/etc/passwd")
    good = json.loads((workdir / "result.json").read_text())
    run, export = good["runs"][0], good["export"]
    for place, name in ((run, "plan"), (run, "scores"), (run, "metrics"), (run, "path"), (export, "path")):
        before, place[name] = place.get(name), [outside] if name == "scores" else outside
        (workdir / "result.json").write_text(json.dumps(good))
        refused(r"result.json: ('.*' lies outside|is not valid JSON).*run `vlmprune run` ag", read_result, workdir)
        place[name] = before


def test_files_that_are_none(workdir):
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path), lambda path: os.symlink("/dev/zero", path)):
        for name in ("result.json", "depth/plan.json", "depth/scores.npz"):
            path = workdir / name
            path.rename(workdir / "kept")
            make(path)
            refused(rf"{name}\b", build_report, workdir)
            os.rmdir(path) if path.is_dir() else path.unlink()
            (workdir / "kept").rename(path)


NAME = "深度 עומק عمق 🙂 $\\frac{x}$ $x^$ [bold] <b>&\x1b[31m\u202e\udcff" + "long" * 30_000


@pytest.mark.usefixtures("drawn")
def test_names_of_any_letters(several):
    """On the page as text, in figures as letters of a font or spelled out, on the terminal inert; quietly."""
    text = (several / "result.json").read_text().replace('"depth-sft"', json.dumps(NAME))
    result = json.loads(text.replace('"perception"', json.dumps(NAME)).replace('"docs"', json.dumps(NAME)))
    for run in result["runs"]:
        run.update(method=NAME, recovery=NAME, loss_terms={"ce": NAME})
    (several / "result.json").write_text(json.dumps(result))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = build_report(several).read_text()
        shown = printed(several)
    assert "<b>&\x1b" not in page
    assert "深度" in page
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert "[bold] <b>" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_very_many_models_and_sets(several, monkeypatch):
    result = json.loads((several / "result.json").read_text())
    result["runs"] += [{**result["runs"][0], "name": f"run {n}", "recovery": f"r{n}"} for n in range(200)]
    for number in range(20):
        result["sets"][f"set {number}"] = result["sets"]["wiki"]
        for model in (result["teacher"], *result["runs"]):
            model["evaluation"]["scores"][f"set {number}"] = {"bits": 1.0}
    (several / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(console, "MOST_ROWS", 100)
    shown = printed(several)
    assert shown.count("r90") >= 2  # the third table breaks the word
    assert "r150" not in shown
    assert "(shortened from 203 rows and 24 columns)\n" in shown
    curves = {str(n): [{"step": n, "ce": 1.0}] for n in range(30)}
    assert len(plots.loss_figure(curves, {"ce": "ce"}).axes) == 1
