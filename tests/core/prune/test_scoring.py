"""`score` with criteria of a user's that fail, or return something else than they declare."""

import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import EQUAL, batch, config, layer_scores, model

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.part import Key
from vlmprune_jax.core.prune.criteria import CRITERIA
from vlmprune_jax.core.prune.criteria.criterion import Criterion

LAYERS = len(EQUAL)


def wrong(*arguments, **options):
    raise KeyError("my mistake")


RETURNED = {
    "nothing": lambda model: None,
    "other keys": lambda model: {"importance": np.zeros(LAYERS)},
    "a list": lambda model: [1.0] * LAYERS,
    "a text": lambda model: {Key("text", None, "layers"): "high"},
    "texts": lambda model: {Key("text", None, "layers"): np.array(["a"] * LAYERS)},
    "objects": lambda model: {Key("text", None, "layers"): [None] * LAYERS},
    "too few": lambda model: layer_scores(np.zeros(2)),
    "too much": lambda model: {**layer_scores(np.zeros(LAYERS)), Key("text", 0, "mlp"): np.zeros(12)},
    "not a number": lambda model: layer_scores(np.full(LAYERS, np.nan)),
}


@pytest.fixture
def add(monkeypatch):
    """Callable: a criterion "mine" of these arguments, for the time of a test."""
    return lambda *arguments, **more: monkeypatch.setitem(CRITERIA, "mine", Criterion(*arguments, **more))


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_criterion_returns(add, name):
    add(("layers",), "weights", RETURNED[name])
    with pytest.raises(UserError, match=r"criterion 'mine'|importance|mine"):
        vp.score(model(config()), criterion="mine")


@pytest.mark.parametrize("needs", ["weights", "activations", "labels"])
def test_a_criterion_that_fails(add, needs):
    finish = {"finish": lambda sums, model: layer_scores(np.zeros(LAYERS))} if needs == "activations" else {}
    add(("layers",), needs, wrong, **finish)
    batches = None if needs == "weights" else [batch(config())]
    with pytest.raises(
        UserError, match=r"criterion 'mine' failed at .*test_scoring.py:\d+ with KeyError: 'my mistake'"
    ):
        vp.score(model(config()), batches, criterion="mine")


def test_sums_and_an_end_that_do_not_fit(add):
    add(("layers",), "activations", lambda layer, tokens: {"n": jnp.zeros(3)}, finish=wrong)
    with pytest.raises(UserError, match=r"criterion 'mine' failed at .* with KeyError"):
        vp.score(model(config()), [batch(config())], criterion="mine")
    add(("layers",), "activations", lambda layer, tokens: jnp.zeros(3), finish=lambda sums, model: sums)
    with pytest.raises(UserError, match=r"<lambda> returned float32\[3\], expected sums by name"):
        vp.score(model(config()), [batch(config())], criterion="mine")
