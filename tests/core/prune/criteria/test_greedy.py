"""Greedy search against the models that it chooses between, each pruned and run whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import EQUAL, config, hand_plan, model
from refusal import refused

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.core.models.vocabulary import cross_entropy
from vlmprune_jax.core.prune import KeptLayer, apply_plan, fingerprint, reconstruct, score
from vlmprune_jax.core.prune.criteria import greedy


def batches(rows=8, length=10, batch=4):
    """Half of the tokens are answers; every second row is padded."""
    draw = np.random.default_rng(3)
    ids, mask = draw.integers(0, 61, (rows, length)), np.ones((rows, length), np.int32)
    mask[1::2, length - 2 :] = 0
    labels = np.where((np.arange(length) >= length // 2) & (mask == 1), ids, IGNORED)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{name: one[at : at + batch] for name, one in arrays.items()} for at in range(0, rows, batch)]


def loss(one, data):
    total = 0.0
    for batch in data:
        logits, _ = forward(one, batch["input_ids"], attention_mask=batch["attention_mask"])
        wanted = batch["labels"][:, 1:]
        losses = cross_entropy(logits[:, :-1], jnp.maximum(wanted, 0))
        total += float(jnp.sum(jnp.where(wanted == IGNORED, 0.0, losses)))
    return total


def without(teacher, gone, data, solved):
    """The loss of the teacher without these layers."""
    layers = [KeptLayer.whole(i, shape) for i, shape in enumerate(teacher.cfg.text.layers) if i not in gone]
    plan = hand_plan(teacher.cfg, fingerprint(teacher), "depth", text=layers)
    pruned = apply_plan(teacher, plan)
    return loss(reconstruct(pruned, plan, teacher, data)[0] if solved else pruned, data)


@pytest.mark.parametrize("solved", [False, True])
def test_each_time_the_layer_goes_without_which_the_loss_is_least(solved):
    teacher, data = model(config(EQUAL), seed=1), batches()  # layers whose order changes as others go
    told = []
    found = score(teacher, data, criterion="greedy_loss", solved=solved, candidates=9, search=3, progress=told.append)
    gone = list(map(int, np.argsort(found.layers)))
    assert sorted(gone) == [*range(len(teacher.cfg.text.layers))]
    assert told == [
        done for cut in range(3) for done in [*[cut] * (len(gone) - cut), cut + 1]
    ]  # also of what was tried
    for so_far in range(1 if solved else 3):  # solved for, the others are judged behind the first as it was then
        before, rest = gone[:so_far], gone[so_far:]
        assert gone[so_far] == min(rest, key=lambda i: without(teacher, [*before, i], data, solved))


@pytest.mark.parametrize("candidates", [1, 3])
def test_what_a_layer_cost_before_other_cuts_is_not_taken_for_what_it_costs(monkeypatch, candidates):
    tried = []

    def loss_without(cut, layer):
        """Every cut makes all others dearer: layer i costs i + 1 at first, twice that after a cut, then three times."""
        gone = [i for i in range(5) if i not in cut.kept]
        tried.append(layer)
        return cut.loss + sum((i + 1) * (n + 1) for n, i in enumerate(gone)) + (layer + 1) * (len(gone) + 1)

    monkeypatch.setattr(greedy._Cut, "loss_without", loss_without)
    found = score(model(config(EQUAL)), batches(), criterion="greedy_loss", candidates=candidates, search=3)
    assert list(map(int, np.argsort(found.layers)))[:3] == [0, 1, 2]
    assert tried == [0, 1, 2, 3, 4, *([1, 2] if candidates == 1 else [1, 2, 3, 4, 2, 3])]


def test_an_interrupted_search_continues_with_its_trials(monkeypatch, tmp_path):
    teacher, data = model(config(EQUAL)), batches()
    options = {"criterion": "greedy_loss", "solved": True, "candidates": 2, "search": 2}
    expected = score(teacher, data, **options)
    tried, loss_without = [], greedy._Cut.loss_without
    monkeypatch.setattr(greedy._Cut, "loss_without", lambda cut, i: tried.append(i) or loss_without(cut, i))

    def stop(done):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(teacher, data, **options, progress=stop, cache=ArrayCache(tmp_path, {"of": 1}))
    first = len(tried)
    found = score(teacher, data, **options, cache=ArrayCache(tmp_path, {"of": 1}))
    assert (first, len(tried)) == (len(teacher.cfg.text.layers), first + 2)
    assert np.array_equal(found.layers, expected.layers)


@pytest.mark.parametrize(("options", "line"), [
    ({"search": 5}, "search=5 must be at most 4 of the 5 layers"), ({"candidates": 0}, "candidates=0 at least 1"),
])  # fmt: skip
def test_options_out_of_range(options, line):
    refused(line, score, model(config(EQUAL)), batches(), criterion="greedy_loss", **options)


def test_a_loss_that_is_no_number_is_refused():
    teacher = model(config(EQUAL))
    teacher = teacher.replace(params=jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), teacher.params))
    refused("loss of the unpruned model is not finite", score, teacher, batches(), criterion="greedy_loss")
