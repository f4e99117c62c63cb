"""`vlmprune prune --explain` and `vlmprune diff`: what they print of real plans."""

import json

from hf_cases import copy_llava
from prune_cases import EQUAL, config, depth_scores, width_scores
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.models.flops import layer_costs
from vlmprune_jax.core.prune import keep_everything
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.tables import compare, explain
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.cli.main import main

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config(method):
    config = experiment_config()
    config.model.hf_dir = "{folder}/teacher"
    config.score.depth, config.score.width = "random", "l2"
    config.prune.method, config.prune.ratio = method, 0.25
    return config
"""


def rows_of(out):
    """The cells of a printed table by layer, its header as "layer"."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()]
    return {cells[0]: cells for cells in lines if cells and (cells[0] in ("layer", "all") or cells[0].isdigit())}


def test_plans_of_a_golden_are_explained_and_compared(goldens, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # room for every column
    copy_llava(goldens, tmp_path / "teacher")
    (tmp_path / "e.py").write_text(CONFIG.format(folder=tmp_path))
    for method in ("width", "hybrid"):
        flags = [f"--config={tmp_path / 'e.py'}:{method}", f"--workdir={tmp_path / method}"]
        assert main(["score", *flags]) == 0
        assert main(["prune", *flags, "--explain"]) == 0
        first = capsys.readouterr().out
        assert main(["prune", *flags, "--explain"]) == 0
        second = capsys.readouterr().out
        assert "unchanged, skipped" in second
        assert rows_of(first) == rows_of(second) != {}
    assert "decoder: what each layer lost (hybrid by random + l2)" in second
    plan, cfg = vp.PrunePlan.from_json(tmp_path / "hybrid/plan.json"), vp.load(tmp_path / "teacher").cfg
    depth, width = (vp.Scores.load(tmp_path / "hybrid" / name) for name in ("scores.npz", "scores_width.npz"))
    rows, cost = rows_of(second), layer_costs(cfg).of
    gone = int(plan.removed_layers[0])
    assert rows[str(gone)][1:5] == ["0 of 8", "0 of 80", f"{cost(cfg.text.layers[gone]):,}", "100.0 %"]
    assert rows[str(gone)][6:] == [f"1 of {len(cfg.text.layers)}", "-", "-", "removed"]
    layer = plan.layers[0]
    lost = cost(cfg.text.layers[layer.index]) - cost(cfg.text.layers[layer.index].resized(layer.sizes))
    neurons = width.along("mlp")[layer.index]
    share = 1 - neurons[list(layer.kept["mlp"])].sum() / neurons.sum()
    cells = rows[str(layer.index)]
    assert cells[1:4] == [f"{len(layer.kept['q_heads'])} of 8", f"{len(layer.kept['mlp'])} of 80", f"{lost:,}"]
    assert (cells[5], cells[8]) == (f"{depth.layers[layer.index]:.4g}", f"{100 * share:.1f} %")
    assert rows["all"][3] == f"{plan.parameters_before - plan.parameters_after:,}"
    assert main(["diff", str(tmp_path / "width"), str(tmp_path / "hybrid/plan.json")]) == 0
    rows, other = rows_of(capsys.readouterr().out), vp.PrunePlan.from_json(tmp_path / "width/plan.json")
    assert rows[str(gone)] == [str(gone), "A", "-", "-", "-", "-"]
    a, b = (set(one.kept["mlp"]) for one in (other.layers[layer.index], layer))
    assert rows[str(layer.index)][4:] == [f"{len(a)} / {len(b)}", f"{100 * len(a & b) / len(a | b):.1f} %"]
    assert rows["all"][1] == f"both: {100 * (1 - 1 / len(other.layers)):.1f} %"


def test_what_a_layer_was_spared_for_is_said():
    cfg = config(EQUAL)
    width, depth = width_scores(cfg), depth_scores(cfg, [0.0, 1, 2, 3, 4])
    spec = PlanConfig(protect=(0,))
    ((_, header, rows),) = explain(make_plan(depth, cfg, method="depth", ratio=0.2, protect=(0,)), cfg, spec, [depth])
    assert header[-3:] == ["score", "rank", "why"]
    assert [row[-1] for row in rows] == ["protected", "removed", "kept", "kept", "kept", "4 layers kept"]
    spec = PlanConfig(attn_layers=(1, 3), mlp_layers=(2, 5), neurons_multiple=2)
    options = {"attn_layers": (1, 3), "mlp_layers": (2, 5), "neurons_multiple": 2}
    plan = make_plan(width, cfg, method="width", ratio=0.2, **options)
    ((_, _, rows),) = explain(plan, cfg, spec, [width])
    assert [row[-1] for row in rows[:4]] == [
        "heads out of range, neurons out of range",
        "neurons out of range, neurons_multiple=2",
        "neurons_multiple=2",
        "heads out of range, neurons_multiple=2",
    ]
    refused("text/layers has 5 units in the plan, but 3 in this model", explain, plan, config(EQUAL[:3]), spec, [width])


def test_overlaps_of_plans_and_plans_that_have_none(tmp_path, capsys):
    cfg = config(EQUAL)
    plans = [make_plan(width_scores(cfg, seed), cfg, method="width", ratio=0.3) for seed in (0, 1)]
    there, back = compare(*plans)[0][2], compare(*reversed(plans))[0][2]
    assert [row[3::2] for row in there] == [row[3::2] for row in back]
    assert {cell for row in compare(plans[0], plans[0])[0][2] for cell in row[3::2]} == {"100.0 %"}
    sets = [{(layer.index, n) for layer in plan.layers for n in layer.kept["mlp"]} for plan in plans]
    assert there[-1][-1] == f"{100 * len(sets[0] & sets[1]) / len(sets[0] | sets[1]):.1f} %"
    for name, plan in (("a", plans[0]), ("b", keep_everything(cfg, "another", 9))):
        plan.to_json(tmp_path / name / "plan.json")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "these plans are for different models (fingerprints" in capsys.readouterr().err
    assert main(["diff", str(tmp_path / "a")]) == 2
    assert "diff takes two plans: vlmprune diff A B" in capsys.readouterr().err
    assert main(["diff", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "plan.json: no such plan" in capsys.readouterr().err
    data = json.loads((tmp_path / "a/plan.json").read_text())
    del data["sizes_before"]["text/4/mlp"]
    (tmp_path / "b/plan.json").write_text(json.dumps(data))
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
