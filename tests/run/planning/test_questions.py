"""Lower bounds on the time of questions: what each phase is limited by, and who gains where."""

import pytest
from prune_cases import config
from stack_cases import decoder_layer

from vlmprune_jax.base.chips import CHIPS, GIB
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.families.tiles import ImageShape
from vlmprune_jax.run.planning.questions import BATCH, bound

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
    assert found.prefill == pytest.approx(flops / CHIP.flops)
    cache = 2 * 4 * 2 * 8 * 128 * (2048 + 8)
    assert found.decode == pytest.approx(15 * (2 * (LAYERS + HEAD) + cache) / CHIP.hbm_bandwidth)
    assert (found.tower, found.chips, found.rows) == (0, 1, 1)


def test_four_bits_help_a_token_and_eight_bits_a_prompt():
    """On hardware that multiplies in bfloat16, 4-bit weights save nothing of prefill; int8 units halve its products."""
    bf16, w4a16, w8a8 = (of(weights, rows=1) for weights in ("bf16", "w4a16", "w8a8"))
    assert w4a16.prefill == bf16.prefill
    assert w4a16.decode < 0.5 * bf16.decode
    assert 0.5 < w8a8.prefill / bf16.prefill < 0.65  # attention and head stay in bfloat16
    assert w4a16.decode < w8a8.decode < bf16.decode


def test_pruning_helps_both():
    half = CFG.with_layers(CFG.text.layers[:2])
    assert of(cfg=half, rows=1).prefill == pytest.approx(of(rows=1).prefill / 2, rel=1e-3)
    assert of(cfg=half).rows > of().rows  # a smaller cache leaves room for more


def test_groups_of_chips_are_those_with_the_most_questions_a_second():
    """Four chips take a quarter of the time; one question takes all of them; weights that fit nowhere are an error."""
    one, four = of(), of(chips=4)
    assert sum(four.phases(BATCH, 4).values()) <= 0.27 * sum(one.phases(BATCH, 1).values())
    assert of(chips=4, rows=1).chips == 4
    assert of(chips=4, rows=1).seconds == pytest.approx(of(rows=1).seconds / 4)
    large = config((decoder_layer(8, 8, 2**20),) * 4, **WIDE)  # 25 GB
    assert of(cfg=large, chips=8).chips >= 2
    with pytest.raises(UserError, match=r"24.1 GiB of weights do not fit on 1 chips"):
        of(cfg=large)
    assert large.text.layers[0].sizes["mlp"] * 1024 * 3 * 4 * 2 > CHIP.hbm > 15 * GIB


def test_a_chip_without_int8_is_said():
    with pytest.raises(UserError, match="w8a8: this TPU has no int8 units"):
        bound(CFG, CHIPS["tpu7x"], 1, "w8a8", 100, ImageShape(slots=0), 4)
