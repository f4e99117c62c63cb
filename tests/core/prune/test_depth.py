"""Depth plans for engines that hold only some orders of layers."""

import numpy as np
import pytest
from prune_cases import layer_scores

import vlmprune_jax as vp
from vlmprune_jax.core.prune.fingerprints import fingerprint


@pytest.fixture(scope="module")
def model(goldens):
    """Windows in all but every third of six layers."""
    return vp.load(goldens / "families/gemma3/ckpt")


def scores(model, importance, **options):
    return vp.Scores("by hand", fingerprint(model), options, layer_scores(importance))


def test_layers_go_from_the_end_if_their_order_must_stay(model):
    mine = scores(model, [0, 1, 5, 4, 3, 2])
    assert vp.make_plan(mine, model, method="depth", layers_removed=2).removed_layers == (0, 1)
    plan = vp.make_plan(mine, model, method="depth", layers_removed=2, loads_in=("gguf",))
    assert plan.removed_layers == (4, 5)


def test_too_few_can_go(model):
    """The reason names the engine and an alternative."""
    mine = scores(model, range(6))
    with pytest.raises(vp.UserError, match=r"0 and 0 .*loads_in='gguf': .*full attention in .*remove n consec"):
        vp.make_plan(mine, model, method="depth", layers_removed=2, loads_in=("gguf",), protect=(2, 5))


def test_a_block_keeps_the_order(model):
    """Three consecutive layers may go anywhere, the first two not."""
    three = scores(model, [3, 0, 1, 2, np.inf, np.inf], layers_removed=3)
    plan = vp.make_plan(three, model, method="depth", layers_removed=3, loads_in=("gguf",))
    assert plan.removed_layers == (1, 2, 3)
    two = scores(model, [*range(5), np.inf], layers_removed=2)
    plan = vp.make_plan(two, model, method="depth", layers_removed=2, loads_in=("gguf",))
    assert plan.removed_layers == (1, 2)
