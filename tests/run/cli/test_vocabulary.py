"""`vlmprune vocabulary`: what sizes save and cost, before anything is written; and the advice to trim one first."""

import pytest
from vocabulary_cases import TOPICS, texts_file, tokenized_folder

from vlmprune_jax.base.settings import override
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning.case import predict_plan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tokenized_folder(tmp_path_factory.mktemp("model") / "llama", "llama")


def test_a_row_for_each_size(model, tmp_path, capsys):
    sources = texts_file(tmp_path / "s.json", [TOPICS[2][i * 100 : (i + 1) * 100] for i in range(40)])
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["vocabulary", f"--model={model}", f"--sources={sources}", "--sizes=400,448", "--multiple=8"]) == 0
    out = capsys.readouterr().out
    assert "on 4 held-out texts" in out
    cfg = read_config(model)[1]
    for size in (400, 448):
        row = next(line.split() for line in out.splitlines() if line.strip().startswith(f"{size} "))
        per_row = (1 if cfg.text.tie_embeddings else 2) * cfg.text.hidden_size
        assert row[1] == f"{count_params(cfg) - (640 - size) * per_row:,}"
    assert "--config.prune.vocabulary.size=N" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no model given: add --model=DIR"),
        (["--model={model}", "--sizes=many"], "--sizes=many: must be a number of tokens, such as 16384 or 16k"),
        (["--model={model}"], "prune.vocabulary.sources: name at least one file"),
        (["--model={model}", "--sources=none.txt"], "none.txt: no such file (set in prune.vocabulary)"),
        (["--model={model}", "--sources={file}", "--sizes=64"], "tokens must stay (bytes, special tokens, templates)"),
    ],
)
def test_refusals(model, tmp_path, capsys, flags, message):
    file = texts_file(tmp_path / "s.json", ["a"])
    assert main(["vocabulary", *(flag.format(model=model, file=file) for flag in flags)]) == 2
    assert message in capsys.readouterr().err


def test_the_planner_predicts_its_shapes(model):
    """It knows the size without reading a source."""
    changes = {"prune": {"ratio": 0.3, "method": "width", "vocabulary": {"size": 443, "multiple": 8}}}
    cfg = read_config(model)[1]
    plan = predict_plan(override(Experiment(), changes), cfg)
    assert plan.apply_to(cfg).text.vocab_size == 448
    assert plan.actual_ratio == pytest.approx(0.3, abs=0.03)
