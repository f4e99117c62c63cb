"""What pruning, integers and fewer tokens gain towards a goal."""

import json
import re
from pathlib import Path

import pytest

from vlmprune_jax.run.cli.config_files import shipped_config
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.planning.guide import read_guide
from vlmprune_jax.run.planning.recommend import advise

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192, "vocab_size": 65536,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def ranked(folder, goal, topology="v5e:2x2", ratio=None):
    return advise(folder, goal=(goal, topology), ratio=ratio, guide=read_guide()).ranking


def gains(folder, goal):
    return {choice.name: choice.gain for choice in ranked(folder, goal).choices}


def test_four_bits_win_a_token_and_pruning_a_crowd(folder):
    """A stream reads all weights for a token; a thousand questions are arithmetic, of which 4 bits save nothing."""
    rows = "a vocabulary of 32,768"
    token, crowd, memory = (gains(folder, goal) for goal in ("decode", "throughput", "memory"))
    (layers,) = (name for name in token if re.fullmatch(r"depth .* of the decoder\)", name))
    assert token["w4a16"] > 2 > token[layers] > 1.2
    assert min(crowd["w8a8"], crowd[layers]) > 1.2 > crowd["w4a16"] >= 1
    assert memory[f"{rows}, w4a16"] > memory["w4a16"] > memory["w8a8"] > memory[layers] > 1
    assert token[rows] > 1
    assert "half the image tokens" not in token
    assert token["as it is"] == 1


def test_a_model_that_does_not_fit_is_said(folder, capsys):
    (choice,) = (c for c in ranked(folder, "question", "tpu7x:2x2x1", 0.2).choices if c.gain == 1)
    assert choice.name == "as it is"
    (Path(folder) / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 600}))  # 80 GB
    assert main(["recommend", f"--model={folder}", "--for=question", "--on=v5e:2x2"]) == 0
    out = capsys.readouterr().out
    assert "as it is" in out
    assert "does not fit" in out
    assert "nothing ran" in out.replace("\n ", "")


def test_unknown_goals_and_slices_are_one_line(folder, capsys):
    assert main(["recommend", f"--model={folder}", "--for=joy"]) == 2
    assert "--for 'joy' is not one of memory, decode, question, throughput" in capsys.readouterr().err
    assert main(["recommend", f"--model={folder}", "--for=memory", "--on=v9"]) == 2
    assert "unknown TPU" in capsys.readouterr().err
    assert main(["recommend", f"--model={folder}", "--for=memory", "--on=tpu"]) == 0
    assert "on v5e:2x4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("goal", "on", "ratio", "methods"),
    [
        ("decode", "v5e:1x1", None, {"depth", "width", "hybrid"}),  # equal within 5 %, so the rule decides
        ("question", "v5e:1x1", 0.45, {"depth", "width", "hybrid"}),
    ],
)
def test_the_methods_that_gain_most_are_the_ones_advised(folder, goal, on, ratio, methods):
    advice = advise(folder, goal=(goal, on), ratio=ratio, guide=read_guide())
    assert {*advice.ranking.methods} == methods
    assert {*advice.plans} <= methods
    for method, plan in advice.plans.items():
        if on == "v5e:1x1":
            assert any(
                choice.name.startswith(f"{method} {100 * plan.actual_ratio:.3g} %") for choice in advice.ranking.choices
            )


def test_a_method_that_the_machine_cannot_use_is_neither_ranked_nor_advised(capsys):
    """The demo's heads of 16 fill no block of a TPU, so only layers are left; the advice and its command follow."""
    model = shipped_config("demo").model.hf_dir
    assert main(["recommend", f"--model={model}", "--ratio=0.45", "--for=question", "--on=v5e:1x1"]) == 0
    out = capsys.readouterr().out
    assert "asked: 45 % of the model (82.85 % of the decoder)" in out
    assert "goal: depth pruning: 7.6 times less" in out
    assert "prune: remove whole layers by Block Influence\n" in out
    assert "vlmprune run --config=recommended_45.yaml" in out
    assert "warning: The paper advises against removing more than 60 %" in out


@pytest.mark.parametrize("on", ["llama.cpp", "cpu", "gpu"])
def test_gains_of_another_model_are_refused_in_one_line(folder, capsys, on):
    """What a machine gains depends on the shapes, and nothing was measured with those of this model."""
    assert main(["recommend", f"--model={folder}", "--for=decode", f"--on={on}"]) == 2
    err = capsys.readouterr().err
    assert f"--on={on}: gains depend on the model's shapes, and this model was not measured there" in err
    assert "use a TPU slice such as --on=v5e:2x4 (estimated), or measure its exports with `vlmprune bench`" in err
    assert err.count("\n") == 1
