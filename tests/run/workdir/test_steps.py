"""Workdirs of runs that are not finished: what is there is shown, what is missing is named with its command."""

import re
import shutil

import pytest
from msgspec.structs import replace
from refusal import refused
from report_cases import SPEED, steps_of, write_answers, write_workdir

from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.report.build import build_report
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.content import MadeFrom
from vlmprune_jax.run.workdir.ledger import StageRecord
from vlmprune_jax.run.workdir.steps import STEPS, RecoverFacts, Steps, read_unfinished


@pytest.fixture
def workdir(tmp_path):
    """Two ways to prune, one recovered; everything is evaluated, nothing exported."""
    write_workdir(tmp_path)
    write_answers(tmp_path)
    (tmp_path / "result.json").unlink()
    for model in ("depth/pruned", "depth/sft/recovered", "width/pruned"):
        (tmp_path / model).mkdir()
    return tmp_path


def missing(page):
    return dict(re.findall(r'<li class="missing">(.*?): <code>vlmprune (\w+) --config=FILE.py --workdir=', page))


def test_what_is_there_is_shown_and_what_is_missing_is_named(workdir, capsys):
    """Less and less is there: the export is missing first, then evaluations, models and scores."""
    assert main(["report", f"--workdir={workdir}"]) == 0
    told = f"report: {workdir}/report.html, of an unfinished run: the page lists what is missing"
    assert told in capsys.readouterr().out
    page = (workdir / "report.html").read_text()
    assert "This run is not finished" in page
    rest = {"the export of the best model, its comparison, and all other unfinished stages": "run"}
    assert missing(page) == {"width-sft: recover": "recover", **rest}
    found = read_unfinished(workdir)
    assert [(run.name, run.recovery, run.path) for run in found.runs] == [
        ("depth", "none", "depth/pruned"),
        ("depth-sft", "sft", "depth/sft/recovered"),
        ("width", "none", "width/pruned"),
    ]
    retained = [run.evaluation.retained["questions"] for run in found.runs]
    assert retained == pytest.approx([100 * 10 / 32, 100 * 30 / 32, 100 * 31 / 32])
    assert (workdir / "report.png").is_file()

    (workdir / "width/eval/pruned.json").unlink()
    write_artefact(workdir / "speed.json", SPEED)
    page = build_report(workdir).read_text()
    assert missing(page)["the scores of width"] == "evaluate"
    assert "150 (149 to 155)" in page
    assert [run.name for run in read_unfinished(workdir).runs] == ["depth", "depth-sft"]

    (workdir / "eval").rename(workdir / "kept")
    for folder in ("depth/eval", "depth/sft", "depth/pruned", "width"):
        shutil.rmtree(workdir / folder)
    page = build_report(workdir).read_text()
    assert page.count("<svg") == 2  # what goes, and the importances
    first = {"the scores of the unpruned model": "evaluate", "depth: prune": "prune", "width: score": "score"}
    assert missing(page) == {**first, **rest}
    (workdir / "depth/plan.json").unlink()
    page = build_report(workdir).read_text()
    assert page.count("<svg") == 1
    assert "What was removed" not in page

    shutil.rmtree(workdir / "depth")
    (workdir / "kept").rename(workdir / "eval")
    page = build_report(workdir).read_text()
    assert ">80.00</td>" in page
    assert missing(page)["depth: score"] == "score"


def recorded(workdir, name, facts, **settings):
    """A ledger entry of a finished stage."""
    made_from = MadeFrom(settings=settings, inputs={}, version=1)
    record = StageRecord(made_from=made_from, done=True, seconds=1.5, facts=facts, by={"finished": "now"})
    write_artefact(workdir / f".stages/{name}.json", record)


def test_what_the_ledger_knows_of_finished_steps(workdir):
    facts = {name: 0 for name in RecoverFacts.__struct_fields__} | {
        "recovery": "sft",
        "terms": {"ce": "CE"},
        "last": {},
    }
    recorded(workdir, "depth.score", {})
    recorded(workdir, "depth.prune", {"decoder_ratio": 0.4})
    recorded(workdir, "depth.sft.recover", {**facts, "records": 7, "steps": 3}, **{"data.fraction": 0.25})
    pruned, trained, other = read_unfinished(workdir).runs
    assert (pruned.seconds, trained.seconds, other.seconds) == (3.0, 4.5, None)
    assert (trained.training_records, trained.training_steps, trained.data_fraction) == (7, 3, 0.25)
    assert (trained.loss_terms, trained.decoder_ratio, other.decoder_ratio) == ({"ce": "CE"}, 0.4, None)
    recorded(workdir, "depth.sft.recover", {**facts, "records": "seven"})  # somebody else's
    assert read_unfinished(workdir).runs[1].training_records is None


def test_models_in_the_workdir_itself(workdir):
    for name in ("scores.npz", "plan.json", "pruned"):
        (workdir / "depth" / name).rename(workdir / name)
    (workdir / "depth/sft/recovered").rename(workdir / "recovered")
    shutil.rmtree(workdir / "depth")
    shutil.rmtree(workdir / "width")
    (workdir / "pruned/plan.json").write_text("{}")  # a model's own, beside its config
    (workdir / "pruned/config.json").write_text("{}")
    for name in ("pruned", "recovered"):
        shutil.copy(workdir / "eval/teacher.json", workdir / f"eval/{name}.json")
    steps = [replace(step, folder=".") for step in steps_of("depth", "recovered", ".")]
    write_artefact(workdir / STEPS, Steps(steps=steps))
    assert [run.name for run in read_unfinished(workdir).runs] == ["depth", "depth-recovered"]


def test_nothing_of_a_run(tmp_path, capsys):
    refused("contains no run: run `vlmprune run` first", build_report, tmp_path)
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
