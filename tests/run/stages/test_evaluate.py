"""Named evaluation sets from the command line: each asked apart, and scored from its answers on disk."""

import dataclasses
import json
import os
import re
import shutil

import pytest
from experiment_cases import record, write_experiment
from hf_cases import copy_llava
from refusal import refused
from report_cases import SPEED
from repository import ROOT
from sweep_cases import QUIET

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.journal import Journal
from vlmprune_jax.base.settings import override
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.run.cli.config_files import experiment_config
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.run.evaluation.metrics import METRICS, Metric
from vlmprune_jax.run.evaluation.metrics.metric import mean
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import check_experiment
from vlmprune_jax.run.stages import evaluate as stage
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.speed import Speed
from vlmprune_jax.run.workdir.store import Store

SETS = {
    "questions": {},
    "short": {"questions": 3, "max_new_tokens": 1, "prompt_suffix": " Say it."},
    "wiki": {"text": "{root}/text.txt", "text_window": 8},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    root = tmp_path_factory.mktemp("sets")
    records = [record(f"r{i}", f"img{i % 4}.png", "Is it red?", "yes") for i in range(6)]
    (root / "text.txt").write_text("The car is red and quiet. " * 4)
    asked = {"batch_size": 4, "max_new_tokens": 2}
    write_experiment(root, goldens, records, data={"eval": f"{root}/records.json"}, evaluate=asked)
    return root


@pytest.fixture
def evaluate(root, tmp_path, capsys):
    """Callable (names in SETS, *flags) -> (exit code, lines that were printed); `folder` holds what it made."""

    def command(names, *flags):
        config = json.loads((root / "experiment.yaml").read_text())
        config["evaluate"]["sets"] = {name: SETS[name] for name in names.split("+")}
        (tmp_path / "config.yaml").write_text(json.dumps(config).replace("{root}", str(root)))
        capsys.readouterr()
        code = main(["evaluate", f"--config={tmp_path / 'config.yaml'}", f"--workdir={tmp_path / 'w'}", *flags])
        shown = capsys.readouterr()
        return code, (shown.out + shown.err).splitlines()

    command.folder = tmp_path / "w/eval"
    return command


def values(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["values"]


def test_a_set_more_repeats_no_other(evaluate):
    code, lines = evaluate("questions")
    assert code == 0, lines
    assert "evaluate teacher ..." in lines
    [warning] = [line for line in lines if "warning: the unpruned model scores 0: compare its answers" in line]
    assert "teacher.answers.jsonl; the prompt (data.template, data.system," in warning
    assert sorted(os.listdir(evaluate.folder)) == ["teacher.answers.jsonl", "teacher.json"]
    code, lines = evaluate("questions+short+wiki")
    assert code == 0, lines
    media = "files of images and videos are not compared"
    assert f"evaluate teacher: unchanged, skipped (eval/teacher.answers.jsonl is up to date; {media})" in lines
    assert {"evaluate teacher short ...", "evaluate teacher wiki ..."} <= set(lines)
    files = {f"teacher.{name}" for name in ("short.json", "short.answers.jsonl", "wiki.json", "wiki.answers.jsonl")}
    assert set(os.listdir(evaluate.folder)) == files | {"teacher.answers.jsonl", "teacher.json"}
    short = [json.loads(line) for line in (evaluate.folder / "teacher.short.answers.jsonl").read_text().splitlines()]
    assert [(answer["id"], answer["references"], answer["tokens"]) for answer in short] == [
        (f"r{i}", ["yes"], 1) for i in range(3)
    ]
    assert list(values(evaluate.folder, "teacher.wiki")) == ["perplexity", "bits_per_byte"]
    code, lines = evaluate("questions+short", "--config.evaluate.sets.short.prompt_suffix=?")
    assert code == 2
    assert "evaluate teacher short: " in lines[-1]
    assert '(evaluate.sets.short.prompt_suffix was " Say it.", now "?"): add --overwrite' in lines[-1]


def test_another_metric_asks_nothing(evaluate, monkeypatch):
    assert evaluate("short")[0] == 0
    monkeypatch.setitem(
        METRICS, "length", Metric("letters", lambda said, *_: {"letters": len(said)}, full=None, unit="")
    )
    code, lines = evaluate("short", "--config.evaluate.sets.short.metric=length")
    assert code == 0, lines
    compared = "eval/teacher.short.answers.jsonl is up to date; files of images and videos are not compared"
    assert f"evaluate teacher short: unchanged, skipped ({compared})" in lines
    answers = (evaluate.folder / "teacher.short.answers.jsonl").read_text().splitlines()
    lengths = [len(json.loads(line)["prediction"]) for line in answers]
    assert values(evaluate.folder, "teacher.short") == {"letters": pytest.approx(sum(lengths) / 3)}
    assert any(f"  teacher short: letters {sum(lengths) / 3:.2f} on 3 questions" in line for line in lines)

    def broken(scores, records):
        raise UserError("the aggregate is not finished")

    monkeypatch.setitem(METRICS, "length", Metric("letters", lambda *_: {"letters": 1}, broken, full=None, unit=""))
    assert evaluate("short", "--config.evaluate.sets.short.metric=length")[0] == 2
    assert evaluate("short")[0] == 0  # the answers are still there


def test_a_pruned_model_is_compared_with_the_unpruned_one(evaluate, goldens, monkeypatch):
    """The same model, whose answers are as long as its own."""
    metric = Metric("letters", lambda said, *_: {"letters": len(said)}, full=None, unit="")
    monkeypatch.setitem(METRICS, "length", metric)
    copy_llava(goldens, evaluate.folder.parent / "pruned")
    code, lines = evaluate("questions", "--config.evaluate.metric=length")
    assert code == 0, lines
    found = {name: json.loads((evaluate.folder / f"{name}.json").read_text()) for name in ("teacher", "pruned")}
    low, high = found["pruned"]["retained_interval"]
    assert low < 100 < high
    assert "retained_interval" not in found["teacher"]
    monkeypatch.setitem(METRICS, "length", dataclasses.replace(metric, aggregate=lambda *given: mean(*given)))
    assert evaluate("questions", "--config.evaluate.metric=length")[0] == 0
    assert "retained_interval" not in json.loads((evaluate.folder / "pruned.json").read_text())  # it may take long


def test_records_that_a_metric_cannot_use_are_refused_before_the_model_is_asked(evaluate):
    code, lines = evaluate("questions", "--config.evaluate.metric=pope")
    assert code == 2
    assert lines[-1].endswith(
        "metric \"f1\": record r0: has no field 'category', which the metric needs: add it, or choose another metric"
    )
    assert not evaluate.folder.exists() or os.listdir(evaluate.folder) == []


def test_a_text_is_continued_after_its_last_batch(evaluate, root, monkeypatch):
    """Its numbers are those of the pass that nothing stopped."""
    original, added = Journal.add, []

    def add(self, entry):
        original(self, entry)
        added.append(entry)
        if len(added) == 2:
            raise KeyboardInterrupt

    few = "--config.evaluate.batch_size=1"
    monkeypatch.setattr(Journal, "add", add)
    assert evaluate("wiki", few)[0] == 130
    assert os.listdir(evaluate.folder) == ["teacher.wiki.json.journal"]
    assert evaluate("wiki", few)[0] == 0
    lines = map(json.loads, (evaluate.folder / "teacher.wiki.answers.jsonl").read_text().splitlines())
    assert [{name: line[name] for name in ("nll", "tokens")} for line in lines] == added  # none twice
    first = values(evaluate.folder, "teacher.wiki")
    assert evaluate("wiki", few, "--config.evaluate.sets.wiki.text_window=9", "--overwrite")[0] == 0
    assert values(evaluate.folder, "teacher.wiki") != first
    assert evaluate("wiki", few, "--overwrite")[0] == 0
    assert values(evaluate.folder, "teacher.wiki") == first


# --- settings --------------------------------------------------------------------------------------------------------

DATA = DataSpec(eval="e.json", images="i", eval_images="ei")


def test_without_sets_there_are_those_of_the_old_settings():
    plain = evaluation_sets(DATA, EvaluateSpec(max_new_tokens=4, questions=9))
    shared = {"prompt_suffix": "", "max_new_tokens": 4, "questions": 9}
    expected = EvaluationSetSpec(data="e.json", images="ei", metric="exact_match", **shared)
    assert plain == {"questions": expected}
    text = EvaluationSetSpec(text="t.txt", metric="perplexity", text_window=512)
    both = evaluation_sets(DATA, EvaluateSpec(text="t.txt"))
    assert (list(both), both["text"]) == (["questions", "text"], text)
    assert evaluation_sets(DataSpec(), EvaluateSpec(text="t.txt")) == {"text": text}


def test_a_set_has_its_own_settings_or_those_of_all():
    spec = {"metric": "exact_match", "max_new_tokens": 4, "sets": {"a": {"data": "a.json", "questions": 3}, "b": {}}}
    sets = evaluation_sets(DATA, override(EvaluateSpec(), spec))
    assert (sets["a"].data, sets["a"].images, sets["a"].questions, sets["a"].max_new_tokens) == ("a.json", "ei", 3, 4)
    assert (sets["b"].data, sets["b"].questions) == ("e.json", None)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"sets": {"a": {"metirc": "x"}}}, "config.evaluate.sets.a has no setting 'metirc'; did you mean 'metric'?"),
        ({"sets": {"a": 3}}, "config.evaluate.sets.a=3: is a section"),
        ({"sets": {"a": {"max_new_tokens": 0}}}, "evaluate.sets.max_new_tokens=0 must be at least 1"),
        ({"sets": {"a": {"text": "t", "data": "d"}}}, "a set cannot have both a text (t) and questions"),
        ({"sets": {"a": {"text": "t", "max_new_tokens": 9}}}, "a set cannot have both a text (t) and questions"),
        ({"sets": {"a": {"data": "d", "text_window": 9}}}, "evaluate.sets: text_window=9 needs a text"),
        ({"sets": {"a/b": {}}}, "the name 'a/b' is used as a file name: use only letters, digits, _ and -"),
        ({"sets": {"a": {"metric": "exact"}}}, "evaluate.sets.a.metric 'exact' is not one of exact_match, "),
        ({"sets": {"a": {"metric": "perplexity"}}}, "metric perplexity scores a text, but the set has questions"),
        ({"sets": {"a": {"text": "t", "metric": "exact_match"}}}, "metric exact_match scores answers to questions,"),
        ({"text": "t", "sets": {"text": {}}}, "evaluate.text defines the set 'text', which evaluate.sets also defines"),
    ],
)
def test_wrong_sets(evaluate, message):
    refused(re.escape(message), lambda: evaluation_sets(DATA, override(EvaluateSpec(), evaluate, "config.evaluate")))


def test_variants_are_compared_on_the_same_sets(tmp_path):
    config = experiment_config()
    config.data.eval = "e.json"
    config.prune_variants = {"a": {"evaluate": {"batch_size": 2}}, "b": {"evaluate": {"questions": 3}}}
    refused("variant b-recovered has other evaluation sets", check_experiment, override(Experiment(), config.to_dict()))


def test_a_config_may_name_sets_one_by_one_or_together():
    config = experiment_config()
    config.evaluate.sets.a = {"metric": "exact_match"}
    config.evaluate.sets = {"b": {"questions": 3}, "a": {"max_new_tokens": 5}}
    sets = override(Experiment(), config.lock().to_dict()).evaluate.sets
    assert sets == {
        "a": EvaluationSetSpec(metric="exact_match", max_new_tokens=5),
        "b": EvaluationSetSpec(questions=3),
    }


# --- speed of the shapes of a run ------------------------------------------------------------------------------------


def test_runs_of_a_sweep_measure_a_shape_once(tmp_path, monkeypatch):
    """Three runs with models of one shape have the same numbers; another prompt is measured anew."""
    measured = []
    pair = SPEED.pairs[0]

    def measure(models, spec):
        measured.append(spec.prompt_tokens)
        return {"unpruned": pair.unpruned, "pruned": pair.pruned}

    monkeypatch.setattr(stage, "measure_speed", measure)
    monkeypatch.setattr(Work, "load", lambda self, folder: None)
    teacher = str(ROOT / "vlmprune_jax/demo/teacher")
    for number, tokens in enumerate((640, 640, 100)):
        workdir = tmp_path / f"run{number}"
        shutil.copytree(teacher, workdir / "pruned")
        spec = {"rounds": 5, "prompt_tokens": tokens}
        experiment = override(Experiment(), {"model": {"hf_dir": teacher}, "speed": spec})
        work = Work.at(workdir, experiment, QUIET, store=Store(tmp_path / "shared"))
        for _ in range(2):
            stage.measure_shapes(work, {f"depth-{number}": workdir / "pruned"})
        (measured_pair,) = read_artefact(workdir / "speed.json", Speed).pairs
        assert measured_pair.models == [f"depth-{number}"]
        assert measured_pair.prefill_limit == measured_pair.decode_limit == 1.0  # nothing is removed
    assert measured == [640, 100]
