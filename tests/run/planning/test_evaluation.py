"""`vlmprune plan --evaluation`: what decoding touches of HBM and of other chips, and times that follow from shapes."""

import importlib

import jax
import pytest
import recover_cases as cases
from experiment_cases import write_experiment
from prune_cases import config
from refusal import refused
from repository import ROOT
from stack_cases import decoder_layer

from vlmprune_jax.base.chips import CHIPS, GIB
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import DeltaNet
from vlmprune_jax.io.families.tiles import ImageShape
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.config import EvaluateSpec
from vlmprune_jax.run.planning.ahead_of_time import make_slice
from vlmprune_jax.run.planning.evaluation import BATCH, BENCHMARKS, bound, plan_evaluation
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.tpu_plan import TpuPlan


@pytest.fixture
def compiled(monkeypatch):
    """Callable (config, rows, prompt tokens) -> compiled decoding on a slice."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    decoding = importlib.import_module("decoding_plan")

    def compile_for(cfg, rows, length):
        with jax.default_matmul_precision("default"):
            return decoding.compile_evaluation(cfg, make_slice("v5e:2x2"), length, ImageShape(slots=0), rows, (2, 1, 2))

    return compile_for


@pytest.mark.slow
@pytest.mark.parametrize("head", [64, 96, 128])
def test_decoding_touches_little_more_than_weights_and_cache(head, compiled):
    """Compiled for a slice; the bar is 1.25 times the bytes of weights and cache on a chip. The cache is not copied."""
    widths = {"hidden_size": 1024, "head_dim": head, "vocab_size": 4096, "max_positions": 8192}
    found = compiled(config((decoder_layer(8, 8, 16384),) * 3, **widths), 32, 4096)
    assert (found.read + found.received) / found.resident < 1.25
    assert 0 < found.received < 0.05 * found.read
    assert found.programs[1].temporaries < 0.1 * found.resident


@pytest.mark.slow
def test_the_state_of_delta_nets_is_read_once_a_token(compiled):
    """Bytes per token of a hybrid decoder: those of its weights, keys and values, and matrices, whatever the length."""
    widths = {"hidden_size": 1024, "head_dim": 128, "vocab_size": 4096, "max_positions": 8192}
    cfg = config((decoder_layer(8, 8, 16384),) * 2, **widths)
    delta = Layer(DeltaNet(16, 8, key_dim=128, value_dim=128), cfg.text.channel)
    cfg = cfg.with_layers([delta, cfg.text.layers[1]])
    assert delta.mixer.state_bytes(10, 2) == delta.mixer.state_bytes(1000, 2) == 4 * 16 * 128**2 + 2 * 3 * 4096
    found = compiled(cfg, 8, max(question.text for question in BENCHMARKS.values()))
    assert (found.read + found.received) / found.resident < 1.25  # below 1: some weights stay in VMEM


def test_memory_and_times_follow_from_the_shapes():
    """A model of half the layers takes less; longer answers take more; rows fill what shares them."""
    target, cfg = make_slice("v5e:2x2"), cases.config(layers=8)
    whole, half = (
        plan_evaluation(one, "bfloat16", target, None, EvaluateSpec(batch_size=6))
        for one in (cfg, cfg.with_layers(cfg.text.layers[:4]))
    )
    assert whole.rows == 8
    assert (whole.cache, whole.weights) > (half.cache, half.weights)
    assert half.largest_batch > whole.largest_batch > 8
    seconds = [{name: sum(parts.values()) for name, parts in one.phases["bf16"].items()} for one in (whole, half)]
    assert list(seconds[0]) == list(BENCHMARKS)
    assert all(seconds[1][name] < seconds[0][name] for name in BENCHMARKS)
    assert seconds[0]["MathVista"] > seconds[0]["AI2D"] > 0
    large, rows = CFG.with_layers(CFG.text.layers * 4), EvaluateSpec(batch_size=8192)
    told = "needs .* GiB of HBM per chip for weights and cache, which is"
    refused(told, plan_evaluation, large, "bfloat16", target, None, rows)


def test_the_command_plans_evaluation_without_training(goldens, tmp_path, capsys):
    sections = {"prune": {"layers_removed": 1}, "recover": {"method": "none"}, "evaluate": {"batch_size": 6}}
    config = write_experiment(tmp_path, goldens, [], goldens / "ckpt/llava_hf", **sections)
    flags = [config, "--topology=v5e:2x2", f"--save={tmp_path / 'p.json'}"]
    assert main(["plan", *flags, "--evaluation"]) == 0, capsys.readouterr().err
    assert "1,000 questions, bf16 at least, in seconds (tower + prefill + decoding): MMMU" in capsys.readouterr().out
    [planned] = read_artefact(tmp_path / "p.json", TpuPlan).evaluations.values()
    assert planned.model.layers == 5
    assert main(["plan", *flags]) == 2
    assert "there is no training to plan" in capsys.readouterr().err


# --- lower bounds on the time of questions: what each phase is limited by, and who gains where -----------------------

CHIP = CHIPS["v5e"]
WIDE = {"hidden_size": 1024, "head_dim": 128, "vocab_size": 4096, "max_positions": 8192}
CFG = config((decoder_layer(8, 8, 4096),) * 4, **WIDE)
LAYERS = 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096)  # weights of the layers' matrices
HEAD = 4096 * 1024


def of(weights="bf16", cfg=CFG, length=2048, answer=16, rows=None, chips=1):
    return bound(cfg, CHIP, chips, weights, length, ImageShape(slots=0), answer, rows)


def test_a_long_prompt_is_arithmetic_and_a_token_is_memory():
    """By hand: 2 FLOPs per weight and token, and attention's; a step reads all weights once, and half-filled rows."""
    found = of(rows=1)
    flops = 2 * 2048 * LAYERS + 2 * HEAD + sum(layer.mixer.mixing_flops(2048) for layer in CFG.text.layers)
    assert found.phases["prefill"] == pytest.approx(flops / CHIP.flops)
    cache = 2 * 4 * 2 * 8 * 128 * (2048 + 8)
    assert found.phases["decode"] == pytest.approx(15 * (2 * (LAYERS + HEAD) + cache) / CHIP.hbm_bandwidth)
    assert (found.phases["tower"], found.chips, found.rows) == (0, 1, 1)


def test_four_bits_help_a_token_eight_bits_a_prompt_and_pruning_both():
    """On hardware that multiplies in bfloat16, 4-bit weights save nothing of prefill; int8 units halve its products."""
    bf16, w4a16, w8a8 = (of(weights, rows=1) for weights in ("bf16", "w4a16", "w8a8"))
    assert w4a16.phases["prefill"] == bf16.phases["prefill"]
    assert w4a16.phases["decode"] < 0.5 * bf16.phases["decode"]
    assert 0.5 < w8a8.phases["prefill"] / bf16.phases["prefill"] < 0.65  # attention and head stay in bfloat16
    assert w4a16.phases["decode"] < w8a8.phases["decode"] < bf16.phases["decode"]
    refused("w8a8: this TPU has no int8 units", bound, CFG, CHIPS["tpu7x"], 1, "w8a8", 100, ImageShape(slots=0), 4)
    half = CFG.with_layers(CFG.text.layers[:2])
    assert of(cfg=half, rows=1).phases["prefill"] == pytest.approx(bf16.phases["prefill"] / 2, rel=1e-3)
    assert of(cfg=half).rows > of().rows  # a smaller cache leaves room for more


def test_groups_of_chips_are_those_with_the_most_questions_a_second():
    """Four chips take a quarter of the time; one question takes all of them; weights that fit nowhere are an error."""
    one, four = of(), of(chips=4)
    assert sum(four.seconds(BATCH, 4).values()) <= 0.27 * sum(one.seconds(BATCH, 1).values())
    assert of(chips=4, rows=1).chips == 4
    assert sum(of(chips=4, rows=1).phases.values()) == pytest.approx(sum(of(rows=1).phases.values()) / 4)
    large = config((decoder_layer(8, 8, 2**20),) * 4, **WIDE)  # 25 GB
    assert of(cfg=large, chips=8).chips >= 2
    refused(r"24.1 GiB of weights do not fit on 1 chips", of, cfg=large)
    assert large.text.layers[0].sizes["mlp"] * 1024 * 3 * 4 * 2 > CHIP.hbm > 15 * GIB
