"""Width pruning in several steps as the commands do it: the first from scores.npz, none scored twice."""

import json
import shutil

import jax
import numpy as np
import pytest
from experiment_cases import record, write_experiment

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.flops import layer_costs
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import score
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.io.checkpoints.read import load, read_config
from vlmprune_jax.io.exports import pruning
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.io.exports.pruning import make_plan, prune_folder, prune_iteratively
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.stages.prune import _check_integers


@pytest.fixture
def experiment(tmp_path, goldens):
    prune = {"method": "width", "ratio": 0.25, "steps": 3}
    config = write_experiment(tmp_path, goldens, [], score={"width": "l2", "reduction": "sum"}, prune=prune)
    return [config, f"--workdir={tmp_path / 'w'}"]


def test_the_first_step_uses_the_scores_that_are_there(experiment, tmp_path, monkeypatch, capsys):
    scored, score = [], pruning.score
    monkeypatch.setattr(pruning, "score", lambda model, *rest, **more: scored.append(1) or score(model, *rest, **more))
    assert main(["prune", *experiment]) == 2
    assert "scores.npz: no such file or folder: run `vlmprune score`" in capsys.readouterr().err
    assert main(["score", *experiment]) == 0
    assert main(["prune", *experiment]) == 0
    assert len(scored) == 2
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    model = vp.load(tmp_path / "teacher")
    options = {"reduction": "sum", "gqa": "groups"}
    _, expected, scores = prune_iteratively(
        model, lambda _: (), steps=3, criterion="l2", score_options=options, ratio=0.25, heads="auto"
    )
    assert plan.layers == expected.layers
    assert len(scores) == 3
    assert main(["prune", *experiment]) == 0
    assert "prune: unchanged, skipped" in capsys.readouterr().out


def test_listed_layers_need_no_scores(experiment, tmp_path, capsys):
    listed = [*experiment, "--config.prune.method=depth", "--config.prune.steps=1", "--config.prune.ratio=None"]
    assert main(["prune", *listed, "--config.prune.layers=(1,)"]) == 0
    assert "depth: " in capsys.readouterr().out
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    assert (plan.removed_layers, plan.criterion) == ((1,), "listed layers")
    assert plan.parameters_after == count_params(vp.load(tmp_path / "w/pruned").cfg)
    assert main(["score", *listed, "--config.prune.layers=(1,)"]) == 2
    assert "prune.layers lists the layers to remove, so no scores are needed" in capsys.readouterr().err
    assert main(["prune", *listed, "--config.prune.layers=(1,9)", "--overwrite"]) == 2
    assert "prune.layers=[1, 9] contains layers that do not exist: the text stack has" in capsys.readouterr().err
    assert main(["prune", *listed, "--config.prune.method=none"]) == 2
    assert 'prune.method is "none": choose a method' in capsys.readouterr().err


@pytest.mark.parametrize("stack", ["vision", "both"])
def test_the_tower_by_commands(experiment, tmp_path, capsys, stack):
    alone = [*experiment, "--config.prune.steps=1", f"--config.prune.stack={stack}", "--config.prune.ratio=0.05"]
    assert main(["score", *alone]) == 0
    assert main(["prune", *alone]) == 0
    said = capsys.readouterr().out
    plan, source = vp.PrunePlan.from_json(tmp_path / "w/plan.json"), vp.load(tmp_path / "teacher").cfg
    pruned = vp.load(tmp_path / "w/pruned").cfg
    assert abs(plan.actual_ratio - 0.05) < 0.005
    assert f"{100 * plan.actual_ratio:.2f} % of all parameters removed" in said
    lost = {name: 1 - count_params(pruned, name) / count_params(source, name) for name in ("text", "vision")}
    assert f"({100 * lost['text']:.2f} % of the decoder, {100 * lost['vision']:.2f} % of the tower)" in said
    files = {path.name for path in (tmp_path / "w").glob("*.npz")}
    assert files == {"scores_vision.npz"} | ({"scores.npz"} if stack == "both" else set())
    if stack == "vision":
        assert lost["text"] == 0 < lost["vision"]
    else:
        shares = [share_of_layers(plan.apply_to(source), source, name) for name in ("text", "vision")]
        assert abs(shares[0] - shares[1]) < 0.01  # both lose alike
    assert main(["prune", *alone, "--config.prune.ratio=0.2", "--overwrite"]) == (2 if stack == "vision" else 0)
    message = "ratio 0.2 cannot be reached by width pruning of the vision stack within"
    assert (message in capsys.readouterr().err) == (stack == "vision")


def test_scores_of_another_stack_are_not_taken(experiment, tmp_path, capsys):
    tower = [*experiment, "--config.prune.stack=vision", "--config.prune.steps=1", "--config.prune.ratio=0.05"]
    assert main(["score", *experiment]) == 0
    (tmp_path / "w/scores.npz").rename(tmp_path / "w/scores_vision.npz")
    assert main(["prune", *tower]) == 2
    assert "scores_vision.npz: has scores for the text stack, expected the vision stack" in capsys.readouterr().err
    assert main(["prune", *tower, "--config.prune.stack=audio"]) == 2
    assert "audio" in capsys.readouterr().err


def share_of_layers(pruned, source, stack):
    cost = layer_costs(source, stack).of
    return 1 - sum(map(cost, pruned.stack(stack).layers)) / sum(map(cost, source.stack(stack).layers))


def test_what_is_not_one_stack_is_refused(experiment, tmp_path, goldens, capsys):
    both = [*experiment, "--config.prune.stack=both"]
    assert main(["score", *both]) == 0
    assert main(["prune", *both]) == 2
    assert 'cannot prune both stacks at once: set prune.stack to "text" or "vision"' in capsys.readouterr().err
    assert main(["prune", *both, "--config.prune.steps=1", "--config.prune.mlp_layers=(0,2)"]) == 2
    assert "mlp_layers: cannot be used for both stacks at once" in capsys.readouterr().err
    assert main(["score", *both, f"--config.model.hf_dir={goldens}/ckpt/llama_gqa", f"--workdir={tmp_path}/v"]) == 2
    assert "this model has no stack of layers 'vision' (it has text)" in capsys.readouterr().err


def test_rounds_of_the_tower(experiment, tmp_path):
    rounds = [*experiment, "--config.prune.stack=vision", "--config.prune.ratio=0.06"]
    assert main(["score", *rounds]) == 0
    assert main(["prune", *rounds]) == 0
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    assert abs(plan.actual_ratio - 0.06) < 0.005
    assert vp.load(tmp_path / "w/pruned").cfg == plan.apply_to(vp.load(tmp_path / "teacher").cfg)


@pytest.mark.parametrize(
    ("export", "mlp_layers", "share"),  # padding gives heads back everywhere, and would neurons
    [
        ({}, (0, 2), 0.93),
        ({"uneven": "pad", "dtype": "float32"}, (), 0.8),
        ({"layout": "transformers"}, (0, 2), 0.93),
    ],
)
def test_bytes_on_disk_are_those_of_the_export(export, mlp_layers, share, experiment, tmp_path, capsys):
    settings = [f"--config.export.{name}={value}" for name, value in export.items()]
    settings += ["--config.prune.ratio=None", "--config.prune.steps=1"]
    settings += ["--config.prune.attn_layers=(0, 2)", f"--config.prune.mlp_layers={mlp_layers}"]
    assert main(["score", *experiment, *settings]) == 0
    options = {"layout": "source", "uneven": "per_layer", "dtype": "bfloat16", **export}
    vp.save(vp.load(tmp_path / "teacher"), tmp_path / "whole", source_dir=tmp_path / "teacher", **options)
    limit = int(share * on_disk(tmp_path / "whole"))
    assert main(["prune", *experiment, *settings, f"--config.prune.budget.disk_bytes={limit}"]) == 0
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    reached = plan.options["budget_reached"]["disk_bytes"]
    assert f"disk_bytes: {reached:,} of {limit:,} allowed" in capsys.readouterr().out
    cfg, budget = vp.load(tmp_path / "teacher").cfg, {"disk_bytes": limit, "source_dir": str(tmp_path / "teacher")}
    in_python = vp.make_plan(
        vp.Scores.load(tmp_path / "w/scores.npz"), cfg, method="width", attn_layers=(0, 2), mlp_layers=mlp_layers,
        budget=budget | options,
    )  # fmt: skip
    assert in_python.options["budget_reached"] == {"disk_bytes": reached}
    assert in_python.options["budget"] == plan.options["budget"]
    source = tmp_path / "w/pruned"
    vp.save(vp.load(source), tmp_path / "out", source_dir=source, **options)
    # shorter numbers make a shorter header
    assert on_disk(tmp_path / "out") <= reached <= on_disk(tmp_path / "out") + 200
    assert limit - reached < 0.03 * limit
    assert main(["prune", *experiment, *settings, "--overwrite", "--config.prune.budget.disk_bytes=9"]) == 2
    assert "prune.budget.disk_bytes=9: cannot be reached" in capsys.readouterr().err


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_two_targets_are_refused_before_scoring(experiment, capsys):
    settings = ["--config.prune.budget.parameters=1e5", "--config.prune.steps=1"]
    assert main(["score", *experiment, *settings]) == 2
    assert "got ratio and budget" in capsys.readouterr().err
    settings += ["--config.prune.ratio=None", "--config.prune.budget.slice=v5e"]
    assert main(["score", *experiment, *settings]) == 2
    assert "prune.budget.slice: topology 'v5e' is not GENERATION:SIZES" in capsys.readouterr().err
    assert main(["score", *experiment, "--config.prune.budget.parameter=9"]) == 2
    assert "has no setting 'parameter'; did you mean 'parameters'" in capsys.readouterr().err


def test_integers_that_an_engine_does_not_load_are_refused_before_recovery(goldens):
    _, cfg = read_config(goldens / "families/qwen3_vl/ckpt")
    spec = PlanConfig(loads_in=("vllm_tpu",))
    for quantize in ("none", "w8a8", "q8_0"):
        _check_integers(cfg, spec, ExportSpec(quantize=quantize))
    _check_integers(cfg, PlanConfig(), ExportSpec(quantize="w8a16"))
    with pytest.raises(UserError, match=r"loads_in='vllm_tpu': .*w8a16 loads in no class: use symmetric w8a8"):
        _check_integers(cfg, spec, ExportSpec(quantize="w8a16"))


EXPERTS = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{golden}/ckpt"
    config.data.train = config.data.eval = "{root}/records.json"
    config.data.images = "{golden}/images"
    config.data.max_length = 128
    config.score.width, config.score.samples, config.score.batch_size = "reap", 4, 2
    config.prune.method, config.prune.experts = "experts", 5
    return config
"""


def test_experts_are_scored_again_without_a_forward_pass(goldens, tmp_path, capsys, monkeypatch):
    """One pass over the records serves other criteria, token types and counts, and the tokens that lose an expert."""
    turns = [{"from": "human", "value": "<image>\nWhat is in this picture?"}, {"from": "gpt", "value": "a red box"}]
    records = [{"id": f"r{i}", "image": f"{i % 4}.png", "conversations": turns} for i in range(6)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "run.py").write_text(EXPERTS.format(golden=goldens / "families/qwen3_vl_moe", root=tmp_path))
    flags = [f"--config={tmp_path / 'run.py'}", f"--workdir={tmp_path / 'w'}"]
    assert main(["score", *flags]) == 0
    monkeypatch.setattr("vlmprune_jax.core.prune.scores.measure_routing", lambda *args, **options: 1 / 0)
    again = [*flags, "--config.score.width=man", "--config.score.token_types=floor", "--overwrite"]
    assert main(["score", *again]) == 0
    assert main(["prune", *again, "--config.prune.experts=6", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "decoder: share of" in out
    assert "of image tokens" in out
    assert "4 of 4 6 of 8 72 of 96" in " ".join(out.split())  # heads, experts, and neurons of all experts
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    assert {len(layer.kept["experts"]) for layer in plan.layers} == {6}
    assert main(["report", *again, "--config.prune.experts=6"]) == 0
    page = (tmp_path / "w/report.html").read_text()
    assert "Importance by man of the experts of 4 layers" in page
    assert main(["score", *flags, "--overwrite", "--config.score.samples=5"]) == 2


# --- the stage `recover` trains something ----------------------------------------------------------------------------


@pytest.fixture
def flags(tmp_path, goldens):
    """Flags of `vlmprune recover` in a workdir with a pruned model, for 5 records and the default batch size."""
    records = [record(f"r{i}", "img0.png", "Is it one?", "yes") for i in range(5)]
    recover = {"trainable": "projector", "control": False, "epochs": 2.0, "losses": {"ce": 1.0, "l2": 0.0}}
    config = write_experiment(tmp_path, goldens, records, data={"max_length": 64}, recover=recover)
    model = load(tmp_path / "teacher")
    plan = make_plan(score(model, None, criterion="l2"), model.cfg, method="width", ratio=0.1)
    prune_folder(tmp_path / "teacher", plan, tmp_path / "pruned", dtype="float32")
    shutil.copytree(tmp_path / "pruned", tmp_path / "w/pruned")
    (tmp_path / "w/plan.json").write_text(plan.to_json())
    return [config, f"--workdir={tmp_path / 'w'}"]


def test_few_records_make_smaller_batches_that_train(flags, tmp_path, capsys):
    """Before, 5 records made one batch of 128 repeated rows, whose one step was warm-up at rate 0."""
    assert main(["recover", *flags]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    line = (
        "batches have 5 rows instead of recover.batch_size=128, because there are only 5 training records in 2 epochs"
    )
    assert line in said
    lines = [json.loads(line) for line in (tmp_path / "w/training/metrics.jsonl").read_text().splitlines()]
    assert (lines[-1]["step"], lines[-1]["learning_rate"]) == (2, pytest.approx(2e-4))
    before, after = (load(tmp_path / "w" / name).params["projector"] for name in ("pruned", "recovered"))
    assert not all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.mesh.data=8"], "recover: 5 training records in 2 epochs fill no batch of 8 rows"),
        (["--config.recover.epochs=0.1"], "recover: 5 training records in 0.1 epochs fill no batch of 1 row"),
    ],
    ids=["devices", "epochs"],
)
def test_records_that_fill_no_batch_are_refused(flags, tmp_path, capsys, more, message):
    assert main(["recover", *flags, *more]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert "\n" not in line
    assert not (tmp_path / "w/training").exists()


@pytest.mark.parametrize("trainable", ["projector", "lora"])
def test_a_model_that_equals_its_source_is_refused(flags, tmp_path, capsys, trainable):
    """A learning rate that rounding swallows."""
    small = ["--config.recover.learning_rate=1e-30", f"--config.recover.trainable={trainable}"]
    assert main(["recover", *flags, *small]) == 2
    line = capsys.readouterr().err.strip()
    assert "recover: training changed no weight of pruned" in line
    assert "(2 steps of 5 rows, 5 records, learning rate 1e-30, last gradient norm " in line
    assert ", float32): raise recover.learning_rate, " in line
    assert "\n" not in line
    assert not (tmp_path / "w/recovered").exists()
