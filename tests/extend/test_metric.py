"""The metric that how-to/extend.md prints, from a config that imports it, through `vlmprune evaluate`."""

import json
import sys

import pytest
from experiment_cases import registered
from hf_cases import copy_llava

from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.workdir.evaluation import read_evaluated

CONFIG = """
import my_metric
from vlmprune_jax.run.cli.config_files import experiment_config


def get_config():
    config = experiment_config()
    config.model.hf_dir = "{root}/teacher"
    config.data.images = "{images}"
    config.data.system = ""
    config.evaluate.batch_size = 4
    config.evaluate.sets.docs = {{"data": "{root}/docs.json", "metric": "anls_by_category", "max_new_tokens": 3}}
    return config
"""


@pytest.fixture
def flags(tmp_path, goldens):
    """Flags of a config beside the printed file; the metric is forgotten afterwards."""
    copy_llava(goldens, tmp_path / "teacher")
    entries = [
        {
            "id": f"d{i}",
            "image": f"img{i % 2}.png",
            "conversations": [{"from": "human", "value": f"<image>\nWhat is {i}?"}],
            "answers": ["nothing like it", "?"],
            "category": "odd" if i % 2 else "even",
        }
        for i in range(5)
    ]
    (tmp_path / "docs.json").write_text(json.dumps(entries))
    (tmp_path / "config.py").write_text(CONFIG.format(root=tmp_path, images=goldens / "data/images"))
    with registered("A metric", tmp_path, METRICS):
        yield [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'w'}"]


def test_the_printed_metric_scores_a_set(flags, tmp_path, capsys):
    assert main(["evaluate", *flags]) == 0, capsys.readouterr().err
    assert "  teacher docs: anls 0.00 % on 5 questions" in capsys.readouterr().out
    answers = tmp_path / "w/eval/teacher.docs.answers.jsonl"
    said = [json.loads(line)["prediction"] for line in answers.read_text().splitlines()]
    assert len(said) == 5

    # The references become what the model says, almost: one letter more in the first, case and blanks in the second.
    entries = json.loads((tmp_path / "docs.json").read_text())
    for entry, text in zip(entries, said, strict=True):
        entry["answers"] = ["nothing like it", text]
    entries[0]["answers"][1] = said[0] + "!"
    entries[1]["answers"][1] = f"  {said[1].upper()} "
    (tmp_path / "docs.json").write_text(json.dumps(entries))
    assert main(["evaluate", *flags, "--overwrite"]) == 0, capsys.readouterr().err
    found = read_evaluated(tmp_path / "w/eval/teacher.docs.json")
    first = 1 - 1 / (len(said[0]) + 1)
    assert len(said[0]) > 1
    assert found.scores == {"anls": pytest.approx([first, 1, 1, 1, 1])}
    assert found.values["anls"] == pytest.approx((first + 4) / 5)
    assert {name: of.questions for name, of in found.groups.items()} == {"even": 3, "odd": 2}
    assert found.groups["odd"].values["anls"] == pytest.approx(1.0)
    assert sys.path.count(str(tmp_path)) == 0


def test_a_typo_in_its_name_is_refused(flags, capsys):
    assert main(["evaluate", *flags, "--config.evaluate.sets.docs.metric=anls_by_categroy"]) == 2
    line = capsys.readouterr().err
    assert "evaluate.sets.docs.metric 'anls_by_categroy' is not one of exact_match, perplexity, " in line
    assert "did you mean 'anls_by_category'?" in line
