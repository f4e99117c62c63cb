"""Rows of limits, and what planning reads from them, for an engine that this file makes up."""

import dataclasses

import pytest
from prune_cases import EQUAL, UNEQUAL, config

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core import limits
from vlmprune_jax.core.limits import ENGINES, Engine, Limit, check_loads, keeps_heads, why_not


@pytest.mark.parametrize(
    ("fields", "layers", "holds"),
    [
        ({"equal": True}, EQUAL, True),
        ({"equal": True}, UNEQUAL, False),
        ({"allowed": ()}, EQUAL, False),
        ({"axes": ("kv_heads",), "multiple": 7}, EQUAL, False),
        ({"axes": ("kv_heads",), "multiple": 1}, EQUAL, True),
        ({"axes": ("mlp",), "allowed": (-1,)}, EQUAL, False),
        ({"axes": ("experts",), "allowed": (-1,)}, EQUAL, True),  # no layer has experts
        ({"component": "vision", "allowed": ()}, EQUAL, True),  # the model has no tower
    ],
)
def test_a_limit_is_about_the_sizes_of_its_axes(fields, layers, holds):
    assert Limit("mine", "reason", **fields).holds(config(layers)) == holds


def test_planning_reads_the_rows(monkeypatch):
    cfg = config(EQUAL)
    heads = {layer.mixer.q_heads for layer in cfg.text.layers}
    mine = Engine("mine 1", lambda cfg: [Limit("mine", "it has one number of heads", axes=("q_heads",), allowed=heads)])
    monkeypatch.setitem(ENGINES, "mine", mine)
    assert why_not(cfg, "mine") is None
    assert keeps_heads(cfg, "text", ["mine"])
    fewer = cfg.with_layers([layer.smaller(layer.mixer.root) for layer in cfg.text.layers])
    with pytest.raises(UserError, match=r"loads_in='mine': .* could not load the pruned model: it has one number"):
        check_loads(fewer, ["mine"])
    with pytest.raises(UserError, match=r"loads_in 'mine2' is not one of .*; did you mean 'mine'"):
        why_not(cfg, "mine2")
    always = dataclasses.replace(mine, always=mine.limits)
    monkeypatch.setitem(ENGINES, "mine", always)
    assert limits.why_no_class(fewer) == "it has one number of heads"
