"""The criterion, loss, metric, stage and format that how-to/extend.md prints, from a config that imports them."""

import importlib.util
import json
import sys

import jax
import numpy as np
import pytest
import recover_cases as cases
from experiment_cases import flags_of, registered
from hf_cases import keep_layers
from refusal import refused
from safetensors.flax import load_file

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import apply
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.workdir.evaluation import read_evaluated
from vlmprune_jax.run.workdir.result import read_result

CONFIG = """
import MODULE  # registers what it defines

from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{folder}/teacher"
    config.data.train = config.data.eval = "{folder}/records.json"
    config.data.images = "{goldens}/data/images"
    config.data.system = ""
    config.data.max_length = 64
SETTINGS    return config
"""


def example(heading, registry, *settings):
    """A fixture: the printed file, and flags of a config beside it that imports it and has these settings."""

    @pytest.fixture
    def fixture(tmp_path, goldens):
        with registered(heading, tmp_path, registry) as path:
            lines = "".join(f"    config.{line}\n" for line in settings)
            yield path, flags_of(CONFIG.replace("MODULE", path.stem).replace("SETTINGS", lines), tmp_path, goldens)

    return fixture


def edit(path):
    with path.open("a") as file:
        file.write("# changed\n")


TRAINING = (
    'recover.trainable = "projector"',
    "recover.control = False",
    "recover.batch_size = 2",
    "recover.steps = 2",
    "recover.log_every = 1",
)
criterion = example(
    "A criterion",
    vp.criteria,
    'score.width = "wanda"',
    'score.options = {{"image_weight": 0.5}}',
    "score.samples = 3",
    "score.batch_size = 2",
    'prune.method = "width"',
    "prune.ratio = 0.2",
)
loss = example(
    "A loss",
    vp.losses,
    'score.width = "l2"',
    'prune.method = "width"',
    "prune.ratio = 0.2",
    'recover.losses = {{"ce": 0.5, "extra": {{"jsd": 0.5}}}}',
    *TRAINING,
)
metric = example(
    "A metric",
    METRICS,
    "evaluate.batch_size = 4",
    'evaluate.sets.docs = {{"data": "{folder}/docs.json", "metric": "anls_by_category", "max_new_tokens": 3}}',
)
stage = example(
    "A stage of your own",
    vp.stages,
    'score.depth = "random"',
    "prune.layers_removed = 1",
    "evaluate.max_new_tokens = 2",
    'export.dtype = "float32"',
    'recover.losses = {{"ce": 1.0, "l2": 0.0}}',
    "recover.learning_rate = 0.1",
    "recover.warmup_ratio = 0.0",
    *TRAINING,
)
exporter = example(
    "An export format",
    vp.formats,
    'export.format = "jax_parameters"',
    'export.options = {{"prefix": "params/"}}',
)


def test_a_criterion_scores_and_prunes(criterion, tmp_path, capsys):
    path, flags = criterion
    assert main(["score", *flags]) == 0
    scores = vp.Scores.load(tmp_path / "w/scores.npz")
    assert (scores.criterion, scores.options) == ("wanda", {"gqa": "groups", "image_weight": 0.5})
    assert main(["prune", *flags]) == 0
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    assert plan.criterion == "wanda"
    values, kept = scores.along("mlp")[2], plan.layers[2].kept["mlp"]
    assert not set(np.argsort(values, kind="stable")[: len(values) - len(kept)]) & set(kept)
    capsys.readouterr()
    assert main(["score", *flags]) == 0
    assert "score: unchanged, skipped" in capsys.readouterr().out
    edit(path)
    for changes, told in (
        ([], "was made from other inputs (criterion wanda changed)"),
        (["--config.score.width=wada"], "did you mean 'wanda'?"),
        (["--config.score.depth=wanda"], "score.depth='wanda' scores widths, not layers: use block_influence or"),
    ):
        assert main(["score", *flags, *changes]) == 2
        assert told in capsys.readouterr().err


def test_a_loss_trains(loss, tmp_path, capsys):
    path, flags = loss
    assert main(["score", *flags]) == main(["prune", *flags]) == main(["recover", *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "w/training/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["jsd"] > 0
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * line["jsd"], rel=1e-5)
    capsys.readouterr()
    assert main(["recover", *flags, "--config.recover.losses.extra.jsd=0.7"]) == 2
    assert "recover.losses.extra.jsd was 0.5, now 0.7" in capsys.readouterr().err
    assert main(["recover", *flags]) == 0
    assert "recover: unchanged, skipped" in capsys.readouterr().out
    edit(path)
    assert main(["recover", *flags]) == 2
    assert "was made from other inputs (loss jsd changed)" in capsys.readouterr().err
    config = tmp_path / "experiment.py"
    config.write_text(config.read_text().replace('"jsd"', '"jsdd"'))
    assert main(["recover", *flags]) == 2
    assert "recover.losses.extra has no term 'jsdd'; did you mean 'jsd'?" in capsys.readouterr().err


def test_the_value_of_a_loss(loss):
    """Against the definition over whole logits, with padding; 0 against oneself; and the weighted total."""
    spec = importlib.util.spec_from_file_location("my_loss", loss[0])
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    cfg = cases.config(vision=False)
    student, teacher = cases.model(cfg, 1), cases.model(cfg, 2)
    batch = next(cases.Stream(cfg, rows=3))
    measure = vp.LossConfig(ce=0.25, extra={"jsd": 2.0}, temperature=1.7, chunk=4, teacher_inputs="own")
    found = vp.losses(student, batch, measure, teacher=teacher)
    ids, mask = batch.arrays["input_ids"], batch.arrays["attention_mask"]
    p, q = (probabilities(one, ids, mask, 1.7) for one in (teacher, student))
    m = 0.3 * p + 0.7 * q
    divergence = (0.3 * p * np.log(p / m) + 0.7 * q * np.log(q / m)).sum(-1)
    assert found["jsd"] == pytest.approx(1.7**2 * divergence[mask == 1].mean(), rel=1e-4)
    assert found["total"] == pytest.approx(0.25 * found["ce"] + 2.0 * found["jsd"], rel=1e-6)
    assert found.keys() == {"ce", "jsd", "total"}
    assert vp.losses(student, batch, measure, teacher=student)["jsd"] == pytest.approx(0.0, abs=1e-6)


def probabilities(model, ids, mask, temperature):
    logits, _ = apply(model.params, model.cfg, ids, attention_mask=mask)
    e = np.exp(np.asarray(logits, np.float64) / temperature)
    return e / e.sum(-1, keepdims=True)


def test_a_metric_scores_a_set(metric, tmp_path, capsys):
    _, flags = metric
    entries = [
        {"id": f"d{i}", "image": f"img{i % 2}.png", "question": f"What is {i}?", "answers": ["nothing like it", "?"]}
        | {"category": "odd" if i % 2 else "even"}
        for i in range(5)
    ]
    (tmp_path / "docs.json").write_text(json.dumps(entries))
    assert main(["evaluate", *flags]) == 0, capsys.readouterr().err
    assert "  teacher docs: anls 0.00 % on 5 questions" in capsys.readouterr().out
    answers = tmp_path / "w/eval/teacher.docs.answers.jsonl"
    said = [json.loads(line)["prediction"] for line in answers.read_text().splitlines()]
    assert len(said) == 5

    # The references become what the model says, almost: one letter more in the first, case and blanks in the second.
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
    capsys.readouterr()
    assert main(["evaluate", *flags, "--config.evaluate.sets.docs.metric=anls_by_categroy"]) == 2
    line = capsys.readouterr().err
    assert "evaluate.sets.docs.metric 'anls_by_categroy' is not one of exact_match, perplexity, " in line
    assert "did you mean 'anls_by_category'?" in line


def test_a_stage_makes_a_model_of_the_run(stage, tmp_path, capsys):
    (path, flags), workdir = stage, tmp_path / "w"
    for command in ("score", "prune"):
        assert main([command, *flags]) == 0
    for command, told in (
        ("wise_ft", "recovered: no such file or folder: run `vlmprune recover` (or `vlmprune run`) first"),
        ("wise_tf", "no command 'wise_tf'; did you mean 'wise_ft'?"),
    ):
        assert main([command, *flags]) == 2
        assert told in capsys.readouterr().err
    assert main(["run", *flags]) == 0, capsys.readouterr().err
    before, after, between = (vp.load(workdir / name).params for name in ("pruned", "recovered", "wise_ft"))
    moved = [np.abs(new - old).max() for new, old in zip(*map(jax.tree.leaves, (after, before)), strict=True)]
    assert max(moved) > 1e-3
    middle = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, before, after)
    jax.tree.map(np.testing.assert_array_equal, between, middle)

    result = read_result(workdir)
    assert [(run.name, run.recovery, run.path) for run in result.runs] == [
        ("depth", "none", "pruned"), ("depth-recovered", "recovered", "recovered"),
        ("depth-recovered-wise_ft", "recovered-wise_ft", "wise_ft"),
    ]  # fmt: skip
    assert (workdir / "eval/wise_ft.answers.jsonl").is_file()
    assert "depth-recovered-wise_ft" in (workdir / "report.html").read_text()
    record = json.loads((workdir / ".stages/wise_ft.json").read_text())
    assert record["facts"]["alpha"] == 0.5
    assert record["made_from"]["inputs"].keys() == {"model.hf_dir", "pruned", "recovered", "stage wise_ft"}
    assert "trained after pruning" in (workdir / "wise_ft/README.md").read_text()

    # Again it is skipped; another share is noticed in its file.
    capsys.readouterr()
    assert main(["run", *flags]) == 0
    assert "wise_ft: unchanged, skipped" in capsys.readouterr().out
    path.write_text(path.read_text().replace("ALPHA = 0.5", "ALPHA = 0.25"))
    sys.modules.pop("wise_ft")
    assert main(["wise_ft", *flags]) == 2
    assert "was made from other inputs (stage wise_ft changed)" in capsys.readouterr().err
    assert main(["wise_ft", *flags, "--overwrite"]) == 0
    (workdir / "result.json").unlink()  # which named the best: without it the last model made is exported
    assert main(["export", *flags, "--overwrite"]) == 0, capsys.readouterr().err
    exported, ours = (vp.load(workdir / name).params for name in ("export", "wise_ft"))
    jax.tree.map(np.testing.assert_array_equal, exported, ours)


def test_a_format_is_written_checked_and_described(exporter, tmp_path, capsys):
    path, flags = exporter
    source, out = tmp_path / "teacher", tmp_path / "w/export"
    vp.prune_folder(source, keep_layers(vp.load(source), [0, 2, 5])[1], tmp_path / "w/pruned")
    for setting, told in (
        ("format=jax_parametres", "did you mean 'jax_parameters'?"),
        ("dtype=source", "export.dtype 'source' is not one of float32, bfloat16, float16"),
        ("layout=transformers", "layout='transformers' is an option of format 'huggingface'"),
        ("quantize=q8_0", "quantize 'q8_0' is not supported by format 'jax_parameters' (supported: none)"),
    ):
        assert main(["export", *flags, f"--config.export.{setting}"]) == 2
        assert told in capsys.readouterr().err
        assert not out.exists()
    assert main(["export", *flags, "--config.export.dtype=float32"]) == 0, capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"README.md", "model.safetensors", "plan.json"}
    pruned = vp.load(tmp_path / "w/pruned")
    expected, stored = flatten(pruned.params), load_file(out / "model.safetensors")
    assert set(stored) == {f"params/{path}" for path in expected}
    assert all(np.array_equal(stored[f"params/{path}"], array) for path, array in expected.items())
    facts = json.loads((tmp_path / "w/.stages/export.json").read_text())["facts"]
    assert facts == {"backend": "jax", "max_abs_logit_difference": 0.0, "tolerance": 0.1}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: jax\n")
    assert "3 of 6 layers" in card
    assert "## Loading\n\n`load_file(...)`" in card
    capsys.readouterr()
    assert main(["export", *flags, "--config.export.dtype=float32"]) == 0
    assert "export: unchanged, skipped" in capsys.readouterr().out

    # Another option or an edited file makes another export; the old folder is replaced only when asked.
    assert main(["export", *flags]) == 2
    assert '(export.dtype was "float32", now "bfloat16")' in capsys.readouterr().err
    assert main(["export", *flags, "--overwrite"]) == 0, capsys.readouterr().err
    assert load_file(out / "model.safetensors")["params/text/embed_tokens/weight"].dtype == "bfloat16"
    edit(path)
    assert main(["export", *flags]) == 2
    assert "format jax_parameters" in capsys.readouterr().err
    options = {"source_dir": tmp_path / "w/pruned", "format": "jax_parameters", "perfix": "params/"}
    refused("has no option 'perfix'; did you mean 'prefix'", vp.save, pruned, tmp_path / "out", **options)
