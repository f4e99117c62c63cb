"""`vlmprune plan --evaluation`: what decoding touches of HBM and of other chips, and times that follow from shapes."""

import importlib

import jax
import pytest
import recover_cases as cases
from prune_cases import config
from repository import ROOT
from stack_cases import decoder_layer

from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import DeltaNet
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.planning import evaluation
from vlmprune_jax.run.planning.ahead_of_time import Compiled, make_slice
from vlmprune_jax.run.planning.evaluation import EvaluationCase, plan_evaluation
from vlmprune_jax.run.planning.questions import BENCHMARKS, Questions
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.tpu_plan import TpuPlan

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = {folder!r}
    config.prune.layers_removed = 1
    config.recover.method = "none"
    config.evaluate.batch_size = 6
    return config
"""


@pytest.fixture
def planned_traffic(monkeypatch):
    """Callable (config, rows) -> plan on a slice, the decoding program, bytes read and resident bytes of a token."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    traffic = importlib.import_module("hbm_traffic")

    def plan(cfg, rows):
        case = EvaluationCase(cfg, "bfloat16", make_slice("v5e:2x2"), None, rows, (2, 1, 2))
        with jax.default_matmul_precision("default"), traffic.compiled_programs() as programs:
            planned = plan_evaluation(case)
        return planned, programs[-1], traffic.bytes_per_token(programs[-1]), traffic.resident_bytes(case, planned)

    return plan


@pytest.mark.slow
@pytest.mark.parametrize("head", [64, 96, 128])
def test_decoding_touches_little_more_than_weights_and_cache(head, monkeypatch, planned_traffic):
    """Compiled for a slice; the bar is 1.25 times the bytes of weights and cache on a chip. The cache is not copied."""
    monkeypatch.setattr(evaluation, "BENCHMARKS", {"long": Questions(0, 0, text=4096, answer=16)})
    widths = {"hidden_size": 1024, "head_dim": head, "vocab_size": 4096, "max_positions": 8192}
    cfg = config((decoder_layer(8, 8, 16384),) * 3, **widths)
    planned, decoding, read, resident = planned_traffic(cfg, 32)
    assert (read + planned.received) / resident < 1.25
    assert 0 < planned.received < 0.05 * read
    assert decoding.temporaries < 0.1 * resident


@pytest.mark.slow
def test_the_state_of_delta_nets_is_read_once_a_token(planned_traffic):
    """Bytes per token of a hybrid decoder: those of its weights, keys and values, and matrices, whatever the length."""
    widths = {"hidden_size": 1024, "head_dim": 128, "vocab_size": 4096, "max_positions": 8192}
    cfg = config((decoder_layer(8, 8, 16384),) * 2, **widths)
    delta = Layer(DeltaNet(16, 8, key_dim=128, value_dim=128), cfg.text.channel)
    cfg = cfg.with_layers([delta, cfg.text.layers[1]])
    assert delta.mixer.state_bytes(10, 2) == delta.mixer.state_bytes(1000, 2) == 4 * 16 * 128**2 + 2 * 3 * 4096
    planned, _, read, resident = planned_traffic(cfg, 8)
    assert (read + planned.received) / resident < 1.25  # below 1: some weights stay in VMEM


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(evaluation, "compile_for_tpu", lambda *_: Compiled(2**30, 2**30, {}, 1, 1.0))


def test_times_follow_from_the_shapes(uncompiled):
    """A model of half the layers takes less; longer answers take more; rows fill what shares them."""
    target, cfg = make_slice("v5e:2x2"), cases.config(layers=8)
    whole, half = (
        plan_evaluation(EvaluationCase(one, "bfloat16", target, None, 6))
        for one in (cfg, cfg.with_layers(cfg.text.layers[:4]))
    )
    assert whole.rows == 8
    assert list(whole.seconds) == list(BENCHMARKS)
    assert all(half.seconds[name] < whole.seconds[name] for name in BENCHMARKS)
    assert whole.seconds["MathVista"] > whole.seconds["AI2D"] > 0


def test_the_command_plans_evaluation_without_training(uncompiled, goldens, tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(goldens / "ckpt/llava_hf")))
    flags = [f"--config={tmp_path / 'config.py'}", "--topology=v5e:2x2", f"--save={tmp_path / 'p.json'}"]
    assert main(["plan", *flags, "--evaluation"]) == 0, capsys.readouterr().err
    assert "1,000 questions, bf16 at least, in seconds (tower + prefill + decoding): MMMU" in capsys.readouterr().out
    [planned] = read_artefact(tmp_path / "p.json", TpuPlan).evaluations.values()
    assert planned.model.layers == 5
    assert main(["plan", *flags]) == 2
    assert "there is no training to plan" in capsys.readouterr().err
