"""Scores, plans and pruned models as the commands make them, of layers, widths, experts and vocabularies."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from experiment_cases import record, write_experiment
from rounding import assert_same_function, double_logits
from scipy.special import log_softmax
from vocabulary_cases import TOPICS, texts_file, tokenized_folder

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.flops import layer_costs
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import score
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.surgery import trim_vocabulary
from vlmprune_jax.io.checkpoints.read import load, read_config
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports import pruning
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.io.exports.pruning import make_plan, prune_folder, prune_iteratively
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.report.build import vocabulary_section
from vlmprune_jax.run.stages.prune import _check_integers
from vlmprune_jax.run.stages.vocabulary import _by_script
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.result import read_result
from vlmprune_jax.run.workdir.vocabulary import VocabularyReport

DEPTH, BOTH = "prune.method=depth prune.steps=1 prune.ratio=None", "prune.stack=both"
TOWER = "prune.stack=vision prune.steps=1"


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    """A teacher, a config, and the scores of both stacks in w/."""
    root = tmp_path_factory.mktemp("prune")
    prune = {"method": "width", "ratio": 0.25, "steps": 3}
    config = write_experiment(root, goldens, [], score={"width": "l2", "reduction": "sum"}, prune=prune)
    assert main(["score", config, f"--workdir={root / 'w'}", "--config.prune.stack=both"]) == 0
    assert {path.name for path in (root / "w").glob("*.npz")} == {"scores.npz", "scores_vision.npz"}
    return root


@pytest.fixture
def command(root, tmp_path, capsys):
    """Callable (name, changed settings, *flags) -> exit code and what was said, in a workdir with those scores."""
    (tmp_path / "w").mkdir()
    for name in ("scores.npz", "scores_vision.npz"):
        shutil.copy(root / "w" / name, tmp_path / "w")

    def call(name, changes, *flags):
        changed = [f"--config.{change}" for change in changes.split()]
        code = main([name, f"--config={root}/experiment.yaml", f"--workdir={tmp_path / 'w'}", *changed, *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def test_the_first_step_uses_the_scores_that_are_there(command, root, tmp_path, monkeypatch):
    scored, score = [], pruning.score
    monkeypatch.setattr(pruning, "score", lambda model, *rest, **more: scored.append(1) or score(model, *rest, **more))
    assert command("prune", "")[0] == 0
    assert len(scored) == 2
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    options = {"reduction": "sum", "gqa": "groups"}
    _, expected, scores = prune_iteratively(
        vp.load(root / "teacher"),
        lambda _: (),
        steps=3,
        criterion="l2",
        score_options=options,
        ratio=0.25,
        heads="auto",
    )
    assert plan.layers == expected.layers
    assert len(scores) == 3
    assert "prune: unchanged, skipped" in command("prune", "")[1]


def test_listed_layers_need_no_scores(command, tmp_path):
    code, said = command("prune", f"{DEPTH} prune.layers=(1,)")
    assert (code, "depth: " in said) == (0, True)
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    assert (plan.removed_layers, plan.criterion) == ((1,), "listed layers")
    assert plan.parameters_after == count_params(vp.load(tmp_path / "w/pruned").cfg)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("score", f"{DEPTH} prune.layers=(1,)", "prune.layers lists the layers to remove, so no scores are needed"),
        ("prune", f"{DEPTH} prune.layers=(1,9)", "prune.layers=[1, 9] contains layers that do not exist: the text"),
        ("prune", f"{DEPTH} prune.method=none", 'prune.method is "none": choose a method'),
        ("prune", "prune.stack=audio", "audio"),
        ("prune", f"{TOWER} prune.ratio=0.2", "ratio 0.2 cannot be reached by width pruning of the vision stack"),
        ("prune", BOTH, 'cannot prune both stacks at once: set prune.stack to "text" or "vision"'),
        ("prune", f"{BOTH} prune.steps=1 prune.mlp_layers=(0,2)", "mlp_layers: cannot be used for both stacks at once"),
        ("score", f"{BOTH} model.hf_dir={{goldens}}/ckpt/llama_gqa", "no stack of layers 'vision' (it has text)"),
        ("score", "prune.budget.parameters=1e5 prune.steps=1", "got ratio and budget"),
        ("score", f"{DEPTH} prune.budget.parameters=1e5 prune.budget.slice=v5e", "'v5e' is not GENERATION:SIZES"),
        ("prune", "prune.budget.disk_bytes=9 prune.ratio=None prune.steps=1", "disk_bytes=9: cannot be reached"),
    ],
)
def test_what_is_refused(command, goldens, tmp_path, name, changes, message):
    code, said = command(name, changes.format(goldens=goldens))
    assert (code, message in said) == (2, True), said
    assert not (tmp_path / "w/pruned").exists()


def test_scores_that_are_missing_or_of_another_stack(command, tmp_path):
    (tmp_path / "w/scores.npz").rename(tmp_path / "w/scores_vision.npz")
    said = command("prune", f"{TOWER} prune.ratio=0.05")[1]
    assert "scores_vision.npz: has scores for the text stack, expected the vision stack" in said
    assert "scores.npz: no such file or folder: run `vlmprune score`" in command("prune", "")[1]


def shares_lost(plan, source, cost):
    """What the decoder and the tower lose, by a function of a config and a stack."""
    return [1 - cost(plan.apply_to(source), name) / cost(source, name) for name in ("text", "vision")]


def test_both_stacks_lose_alike(command, root, tmp_path):
    code, said = command("prune", "prune.stack=both prune.steps=1 prune.ratio=0.05")
    assert code == 0, said
    plan, source = vp.PrunePlan.from_json(tmp_path / "w/plan.json"), vp.load(root / "teacher").cfg
    assert plan.apply_to(source) == vp.load(tmp_path / "w/pruned").cfg
    assert abs(plan.actual_ratio - 0.05) < 0.005
    assert f"{100 * plan.actual_ratio:.2f} % of all parameters removed" in said
    text, tower = shares_lost(plan, source, count_params)
    assert f"({100 * text:.2f} % of the decoder, {100 * tower:.2f} % of the tower)" in said
    cost = layer_costs(source, "text").of, layer_costs(source, "vision").of
    text, tower = shares_lost(plan, source, lambda cfg, name: sum(map(cost[name == "vision"], cfg.stack(name).layers)))
    assert abs(text - tower) < 0.01


def test_rounds_of_the_tower(command, root, tmp_path):
    shutil.rmtree(tmp_path / "w")
    assert command("score", "prune.stack=vision")[0] == 0
    assert [path.name for path in (tmp_path / "w").glob("*.npz")] == ["scores_vision.npz"]
    assert command("prune", "prune.stack=vision prune.ratio=0.06")[0] == 0
    plan, source = vp.PrunePlan.from_json(tmp_path / "w/plan.json"), vp.load(root / "teacher").cfg
    assert abs(plan.actual_ratio - 0.06) < 0.005
    assert vp.load(tmp_path / "w/pruned").cfg == plan.apply_to(source)
    text, tower = shares_lost(plan, source, count_params)
    assert text == 0 < tower


@pytest.mark.parametrize(
    ("export", "mlp_layers", "share"),  # padding gives heads back everywhere, and would neurons
    [({}, (0, 2), 0.93), ({"uneven": "pad", "dtype": "float32", "layout": "transformers"}, (), 0.8)],
)
def test_bytes_on_disk_are_those_of_the_export(export, mlp_layers, share, command, root, tmp_path):
    options = {"layout": "source", "uneven": "per_layer", "dtype": "bfloat16", **export}
    vp.save(vp.load(root / "teacher"), tmp_path / "whole", source_dir=root / "teacher", **options)
    limit = int(share * on_disk(tmp_path / "whole"))
    settings = " ".join(f"export.{name}={value}" for name, value in export.items())
    settings += f" prune.ratio=None prune.steps=1 prune.attn_layers=(0,2) prune.budget.disk_bytes={limit}"
    code, said = command("prune", f"{settings} prune.mlp_layers={mlp_layers}".replace(", ", ","))
    assert code == 0, said
    plan = vp.PrunePlan.from_json(tmp_path / "w/plan.json")
    reached = plan.options["budget_reached"]["disk_bytes"]
    assert f"disk_bytes: {reached:,} of {limit:,} allowed" in said
    cfg, budget = vp.load(root / "teacher").cfg, {"disk_bytes": limit, "source_dir": str(root / "teacher")}
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


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_integers_that_an_engine_does_not_load_are_refused_before_recovery(goldens):
    _, cfg = read_config(goldens / "families/qwen3_vl/ckpt")
    spec = PlanConfig(loads_in=("vllm_tpu",))
    for quantize in ("none", "w8a8", "q8_0"):
        _check_integers(cfg, spec, ExportSpec(quantize=quantize))
    _check_integers(cfg, PlanConfig(), ExportSpec(quantize="w8a16"))
    with pytest.raises(UserError, match=r"loads_in='vllm_tpu': .*w8a16 loads in no class: use symmetric w8a8"):
        _check_integers(cfg, spec, ExportSpec(quantize="w8a16"))


def test_experts_are_scored_again_without_a_forward_pass(goldens, tmp_path, capsys, monkeypatch):
    """One pass over the records serves other criteria, token types and counts, and the tokens that lose an expert."""
    golden = goldens / "families/qwen3_vl_moe"
    records = [record(f"r{i}", f"{i % 4}.png", "What is in this picture?", "a red box") for i in range(6)]
    config = write_experiment(
        tmp_path, goldens, records, golden / "ckpt", data={"images": f"{golden}/images", "max_length": 128},
        score={"width": "reap", "samples": 4, "batch_size": 2}, prune={"method": "experts", "experts": 5},
    )  # fmt: skip
    flags = [config, f"--workdir={tmp_path / 'w'}"]
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


# --- a trimmed vocabulary -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory, goldens):
    """A decoder with a tokenizer, texts, and a config that trims the vocabulary."""
    root = tmp_path_factory.mktemp("vocabulary")
    (root / "text.txt").write_text(TOPICS[1][:400])
    sources = texts_file(root / "sources.json", [TOPICS[2][i * 100 : (i + 1) * 100] for i in range(30)])
    write_experiment(
        root, goldens, [record(f"r{i}", None, TOPICS[i][:60], "yes") for i in range(8)],
        tokenized_folder(root / "teacher", "llama"),
        data={"eval": f"{root}/records.json", "images": None, "template": "llava_v1", "max_length": 128},
        score={"depth": "random", "samples": 2},
        prune={"layers_removed": 1, "vocabulary": {"size": 448, "sources": [str(sources)], "multiple": 8}},
        reconstruct={"method": "least_squares", "samples": 8},
        recover={"trainable": "decoder", "control": False, "batch_size": 2, "steps": 2, "learning_rate": 1e-2,
                 "losses": {"ce": 0.5, "kl": 0.5}},
        evaluate={"text": f"{root}/text.txt", "text_window": 32, "max_new_tokens": 4},
    )  # fmt: skip
    return root


def run(root, command, workdir="w", *more, code=0):
    flags = [f"--config={root / 'experiment.yaml'}", f"--workdir={root / workdir}"]
    assert main([command, *flags, *more]) == code


def test_prune_reports_held_out_texts(trimmed, capsys):
    run(trimmed, "score")
    run(trimmed, "prune")
    said = capsys.readouterr().out
    assert "vocabulary: 448 of 640 tokens" in said
    assert "on 3 held-out texts:" in said
    report = read_artefact(trimmed / "w/vocabulary.json", VocabularyReport)
    assert (report.rows_before, report.rows) == (640, 448)
    sample = report.samples[0]
    assert (sample.texts, sample.broken, sample.measured_bytes) == (3, 0, 300)
    assert sample.tokens_after >= sample.tokens_before
    assert sample.bits_before > 0 < sample.bits_after
    (section,) = vocabulary_section(trimmed / "w", ["plan.json"])
    assert section.tables[0].rows[0][:2] == ("all", "3")
    run(trimmed, "prune")
    assert "prune: unchanged, skipped" in capsys.readouterr().out
    texts_file(trimmed / "sources.json", [TOPICS[4][i * 100 : (i + 1) * 100] for i in range(30)])
    run(trimmed, "prune", code=2)
    assert "prune.vocabulary" in capsys.readouterr().err


def test_a_vocabulary_alone_needs_no_scores(trimmed, capsys):
    run(trimmed, "score", "alone", "--config.prune.layers_removed=None", code=2)
    assert "only the vocabulary is trimmed, so no scores are needed: run `vlmprune prune`" in capsys.readouterr().err
    run(trimmed, "prune", "alone", "--config.prune.layers_removed=None")
    assert not list((trimmed / "alone").glob("scores*"))
    plan = vp.PrunePlan.from_json(trimmed / "alone/plan.json")
    teacher, pruned = vp.load(trimmed / "teacher"), vp.load(trimmed / "alone/pruned")
    assert (plan.method, plan.target_ratio, plan.removed_layers) == ("vocabulary", None, ())
    assert pruned.cfg == plan.apply_to(teacher.cfg)
    sources, folder = (str(trimmed / "sources.json"),), str(trimmed / "teacher")
    tokens = {"size": 448, "sources": sources, "multiple": 8, "source_dir": folder}
    assert vp.make_plan(None, teacher, vocabulary=tokens).vocabulary == plan.vocabulary
    for model, options in ((teacher.cfg, {"vocabulary": tokens}), (teacher, {"ratio": 0.1})):
        with pytest.raises(vp.UserError, match="scores=None needs the model, and is allowed only if"):
            vp.make_plan(None, model, **options)
    with pytest.raises(vp.UserError, match="text/vocab has 640 units in the plan, but 448 in this model"):
        vp.apply_plan(pruned, plan)
    capsys.readouterr()
    whole = dataclasses.replace(plan, kept={}, tokenizer=None)
    whole.to_json(trimmed / "whole.json")
    assert main(["diff", str(trimmed / "alone"), str(trimmed / "whole.json")]) == 0
    said = capsys.readouterr().out
    assert "448 / 640" in said
    assert "70.0 %" in said


@pytest.mark.slow
def test_the_whole_run(trimmed):
    """Tokens of a text are others than the unpruned model's: what is retained is of bits per byte."""
    run(trimmed, "run", "whole")
    work, plan = trimmed / "whole", vp.PrunePlan.from_json(trimmed / "whole/plan.json")
    for name in ("pruned", "reconstructed", "recovered", "export"):
        assert vp.load(work / name).cfg == plan.apply_to(vp.load(trimmed / "teacher").cfg)
        assert len(load_tokenizer(work / name)) <= 448
    result = read_result(work)
    before, after = (one.evaluation.scores["text"]["bits_per_byte"] for one in (result.teacher, result.runs[-1]))
    assert result.runs[-1].evaluation.retained["text"] == pytest.approx(100 * before / after)


def test_the_teacher_is_renormalised_over_the_kept_tokens(trimmed):
    """Its log-probabilities of kept tokens, gathered and renormalised, are those of the trimmed teacher."""
    teacher, plan = vp.load(trimmed / "teacher"), vp.PrunePlan.from_json(trimmed / "w/plan.json")
    kept = np.array(plan.vocabulary.kept)
    rows = np.array([[5, 300, 17, 440]])
    gathered = double_logits(teacher, input_ids=kept[rows])[..., kept]
    trimmed = double_logits(trim_vocabulary(teacher, plan.vocabulary), input_ids=rows)
    renormalised = gathered - np.log(np.exp(gathered).sum(-1, keepdims=True))
    assert_same_function(log_softmax(trimmed, -1), renormalised)


def test_texts_by_script():
    groups = _by_script(["abc", "где кот", "def 12", "123"])
    assert [(name, len(texts)) for name, texts in groups] == [("Latin", 2), ("Cyrillic", 1), ("Other", 1)]


# --- the stage `recover` trains something ----------------------------------------------------------------------------


def test_recovery_trains_something_or_is_refused(tmp_path, goldens, capsys):
    """Five records fill a smaller batch than the default of 128; before, its one step was warm-up at rate 0.

    A learning rate that rounding swallows is refused, of projector and adapters, and so is what fills no batch.
    """
    records = [record(f"r{i}", "img0.png", "Is it one?", "yes") for i in range(5)]
    recover = {"trainable": "projector", "control": False, "epochs": 2.0, "losses": {"ce": 1.0, "l2": 0.0}}
    config = write_experiment(tmp_path, goldens, records, data={"max_length": 64}, recover=recover)
    model, workdir = load(tmp_path / "teacher"), tmp_path / "w"
    plan = make_plan(score(model, None, criterion="l2"), model.cfg, method="width", ratio=0.1)
    prune_folder(tmp_path / "teacher", plan, workdir / "pruned", dtype="float32")
    (workdir / "plan.json").write_text(plan.to_json())

    def recovered(*changes):
        code = main(["recover", config, f"--workdir={workdir}", *[f"--config.recover.{change}" for change in changes]])
        said = capsys.readouterr()
        return code, said.out + said.err

    assert "recover: 5 training records in 0.1 epochs fill no batch of 1 row" in recovered("epochs=0.1")[1]
    assert not (workdir / "training").exists()
    code, said = recovered("learning_rate=1e-30", "trainable=lora")
    assert (code, (workdir / "recovered").exists()) == (2, False)
    assert (
        "recover: training changed no weight of pruned (2 steps of 5 rows, 5 records, learning rate 1e-30, last "
        "gradient norm " in said
    )
    assert ", float32): raise recover.learning_rate, " in said
    shutil.rmtree(workdir / "training")
    code, said = recovered()
    assert code == 0, said
    line = "batches have 5 rows instead of recover.batch_size=128, because there are only 5 training records in 2 "
    assert line + "epochs" in said
    lines = [json.loads(line) for line in (workdir / "training/metrics.jsonl").read_text().splitlines()]
    assert (lines[-1]["step"], lines[-1]["learning_rate"]) == (2, pytest.approx(2e-4))
    before, after = (load(workdir / name).params["projector"] for name in ("pruned", "recovered"))
    assert not all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
