"""What pruning, integers and fewer tokens gain towards a goal."""

import json
from pathlib import Path

import pytest

from vlmprune_jax.cli.main import main
from vlmprune_jax.planning.goals import compare, measured
from vlmprune_jax.planning.guide import read_guide

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


def gains(folder, goal, topology="v5e:2x2", ratio=None):
    return {c.name: c.gain for c in compare(folder, goal, topology, vision_dir=None, ratio=ratio)}


def test_four_bits_win_a_token_and_pruning_a_crowd(folder):
    """A stream reads all weights for a token; a thousand questions are arithmetic, of which 4 bits save nothing."""
    layers, rows = "without 30 % of the decoder by layers", "a vocabulary of 32,768"
    token, crowd, memory = (gains(folder, goal) for goal in ("decode", "throughput", "memory"))
    assert token["w4a16"] > 2 > token[layers] > 1.2
    assert min(crowd["w8a8"], crowd[layers]) > 1.2 > crowd["w4a16"] >= 1
    assert memory[f"{rows}, w4a16"] > memory["w4a16"] > memory["w8a8"] > memory[layers] > 1
    assert token[rows] > 1
    assert "half the image tokens" not in token
    assert token["as it is"] == 1


def test_a_model_that_does_not_fit_is_said(folder, capsys):
    (choice,) = (c for c in compare(folder, "question", "tpu7x:2x2x1", vision_dir=None, ratio=0.2) if c.gain == 1)
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


def test_llama_cpp_has_measured_rows_of_the_nearest_share(folder, capsys):
    assert main(["recommend", f"--model={folder}", "--for=question", "--on=llama.cpp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["depth"], ["width"], ["none"])]
    gains = {(row[0], row[-4]): float(row[-3]) for row in rows}
    assert {method for method, _ in gains} == {"depth", "width", "none"}
    assert gains["none", "F16"] == 1 < gains["none", "Q4_0"] < gains["depth", "Q4_0"]
    assert gains == dict(sorted(gains.items(), key=lambda item: -item[1]))
    near = {row.removed for row in measured(folder, vision_dir=None, ratio=None, guide=read_guide()) if row.removed}
    assert all(abs(removed - 0.3) <= 0.08 for removed in near)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--for=energy",), "--for=energy: no machine of our measurements has a readable energy counter"),
        (("--for=question", "--on=gpu"), "--on=gpu: nothing was measured there: use --on=llama.cpp"),
        (("--for=throughput", "--on=llama.cpp"), "--for=throughput: llama.cpp was measured with single questions only"),
        (("--for=decode", "--on=llama.cpp", "--ratio=0.75"), "was not measured in llama.cpp: use 15 to 45 %"),
    ],
)
def test_goals_and_machines_without_measurements_are_one_line(folder, capsys, flags, message):
    assert main(["recommend", f"--model={folder}", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
