"""`result.json`: what is written, which averages and which model is best, and that older files are read."""

import json

import pytest

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.evaluation.metrics import METRICS, Metric
from vlmprune_jax.report.result import best_run, describe_sets, make_result, make_run, read_result, shown

F1 = Metric("f1", lambda *_: {}, groups=("category", lambda record: "a"))


def found(groups=None, **values):
    """Set -> what the evaluation stage reports of it; all but "questions" and "pope" are texts."""
    metrics = {"questions": ("exact_match", METRICS["exact_match"]), "pope": ("pope", F1)}
    reported = {}
    for name, value in values.items():
        key, metric = metrics.get(name, ("perplexity", METRICS["perplexity"]))
        reported[name] = {
            **{"metric": {"name": key, **metric.describe()}, "values": {metric.main: value}, "groups": groups or {}},
            **{"parameters": 100, "seconds": 1.25, ("tokens" if name == "text" else "questions"): 40},
        }
    return reported


def run(name, model, teacher, parameters=60):
    return make_run(name, {"parameters": parameters, "scores": ["scores.npz"]}, model, teacher, f"{name}/pruned")


def test_a_run_of_the_default_sets_has_the_fields_of_version_1():
    groups = {"yes": {"questions": 40, "accuracy": 0.5}}
    teacher = found(groups, questions=0.8, text=10.0)
    made = run("depth", found(groups, questions=0.6, text=12.5), teacher)
    assert made["evaluation"] == {
        "scores": {"questions": {"accuracy": 0.6}, "text": {"perplexity": 12.5}},
        "retained": {"questions": pytest.approx(75.0), "text": pytest.approx(80.0)},
        "mean_of_ratios": pytest.approx(75.0),  # of benchmarks; perplexity has no full score
        "paper_average": pytest.approx(75.0),
        "groups": {"questions": groups, "text": groups},
    }
    old = ("accuracy", "retained", "questions", "perplexity", "by_answer", "evaluation_seconds", "path", "scores")
    assert [made[name] for name in old] == [
        0.6,
        pytest.approx(75),
        40,
        12.5,
        groups,
        2.5,
        "depth/pruned",
        ["scores.npz"],
    ]


def test_sets_of_other_names_have_only_the_new_fields():
    teacher = found(pope=0.8, vqa=10.0)
    made = run("depth", found(pope=0.6, vqa=12.5), teacher)
    assert set(made) == {"name", "parameters", "scores", "evaluation", "evaluation_seconds", "path"}
    result = make_result(teacher, [made], "depth", {"path": "export"})
    assert set(result["teacher"]) == {"parameters", "evaluation"}
    assert result["version"] == 2
    assert result["sets"]["pope"] == {"name": "pope", **F1.describe(), "questions": 40}


def test_averages_leave_out_what_cannot_be_retained():
    teacher = found(questions=0.0, pope=0.5)
    kept = run("depth", found(questions=0.1, pope=0.25), teacher)["evaluation"]
    assert (kept["retained"], kept["mean_of_ratios"]) == ({"questions": None, "pope": 50.0}, 50.0)
    nothing = run("depth", found(questions=0.1), found(questions=0.0))["evaluation"]
    assert (nothing["mean_of_ratios"], nothing["paper_average"]) == (None, None)
    text = run("depth", found(text=12.5), found(text=10.0))["evaluation"]
    assert (text["mean_of_ratios"], text["paper_average"]) == (pytest.approx(80.0), None)
    json.dumps([kept, nothing, text], allow_nan=False)


def test_intervals_are_written_where_there_are_any_and_read_back(tmp_path):
    teacher, pruned = found(questions=0.8, pope=0.5, text=9.0), found(questions=0.6, pope=0.25, text=9.0)
    pruned["questions"]["retained_interval"], pruned["pope"]["retained_interval"] = (70.5, 80.0), None
    made = make_run("depth", FACTS, pruned, teacher, "pruned")
    assert made["evaluation"]["retained_interval"] == {"questions": (70.5, 80.0), "pope": None}
    file, result = tmp_path / "result.json", make_result(teacher, [made], "depth", EXPORT)
    file.write_text(json.dumps(result))
    intervals = read_result(tmp_path)["runs"][0]["evaluation"]["retained_interval"]
    assert intervals == {"questions": [70.5, 80.0], "pope": None}
    made["evaluation"]["retained_interval"]["pope"] = [1.0]
    file.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"result\.json: .*retained_interval"):
        read_result(tmp_path)


def test_many_groups_stay_in_eval():
    groups = {str(i): {"questions": 1, "f1": 0.5} for i in range(41)}
    assert run("depth", found(groups, pope=0.5), found(groups, pope=0.5))["evaluation"]["groups"] == {}


def test_best():
    teacher = found(questions=0.8, pope=0.5)
    runs = [
        run("a", found(questions=0.8, pope=0.30), teacher),  # 80 % on average, more answers right
        run("b", found(questions=0.6, pope=0.45), teacher, 70),  # 82.5 %
        run("c", found(questions=0.6, pope=0.45), teacher, 60),  # the same, smaller
    ]
    assert best_run(runs, describe_sets(teacher))["name"] == "c"
    teacher = found(questions=0.0)
    runs = [run("a", found(questions=0.0), teacher, 10), run("b", found(questions=0.1), teacher, 90)]
    assert best_run(runs, describe_sets(teacher))["name"] == "b"
    teacher = found(text=10.0)
    runs = [run("a", found(text=20.0), teacher, 10), run("b", found(text=15.0), teacher, 90)]
    assert best_run(runs, describe_sets(teacher))["name"] == "b"
    with pytest.raises(UserError, match="no model was evaluated"):
        best_run([], {})


FACTS = {
    "method": "depth",
    "ratio_asked": 0.3,
    "ratio_reached": 0.31,
    "plan": "plan.json",
    "recovery": "none",
    "data_fraction": 0.0,
    "seconds": 1.5,
    "parameters": 60,
    "scores": ["scores.npz"],
}
EXPORT = {"path": "export", "max_abs_logit_difference": 1e-6}


def test_reading_versions(tmp_path):
    file = tmp_path / "result.json"
    teacher = {"accuracy": 0.8, "questions": 40, "parameters": 100, "by_answer": {"yes": {"questions": 40}}}
    old = {"name": "depth", "accuracy": 0.6, "retained": 75.0, "by_answer": {}, "path": "pruned", **FACTS}
    file.write_text(json.dumps({"teacher": teacher, "runs": [old], "best": "depth", "export": EXPORT}))
    result = read_result(tmp_path)
    assert result["sets"] == {
        "questions": {"name": "exact_match", **METRICS["exact_match"].describe(), "questions": 40}
    }
    assert result["teacher"]["evaluation"] == {
        "scores": {"questions": {"accuracy": 0.8}},
        "groups": {"questions": {"yes": {"questions": 40}}},
    }
    assert result["runs"][0]["evaluation"]["mean_of_ratios"] == 75.0
    made = make_run("depth", FACTS, found(pope=0.5), found(pope=0.5), "pruned")
    new = make_result(found(pope=0.5), [made], "depth", EXPORT)
    file.write_text(json.dumps(new))
    assert read_result(tmp_path) == new
    file.write_text(json.dumps({**new, "version": 3}))
    with pytest.raises(UserError, match=r"result\.json: is of version 3, this is 2: update vlmprune-jax"):
        read_result(tmp_path)
    del new["sets"]
    file.write_text(json.dumps(new))
    with pytest.raises(UserError, match=r"missing required field `sets`.*: run `vlmprune run` again"):
        read_result(tmp_path)


def test_values_are_shown_as_their_metric_says():
    of = describe_sets(found(pope=0.5, text=10.0))
    assert (shown(0.5, of["pope"]), shown(0.5, of["pope"], unit=False)) == ("50.00 %", "50.00")
    assert (shown(12.345, of["text"]), shown(None, of["text"])) == ("12.35", "")
