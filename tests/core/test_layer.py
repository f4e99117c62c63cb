"""Grouping of layers into scans, layers that reuse keys of others, and limits of engines that planning reads."""

import dataclasses
import itertools

import numpy as np
import pytest
from prune_cases import EQUAL, UNEQUAL, config, model
from refusal import refused
from stack_cases import changed, decoder_layer

from vlmprune_jax.core import limits
from vlmprune_jax.core.layer import keep_layers, layer_runs, scan_groups
from vlmprune_jax.core.limits import ENGINES, Engine, Limit, check_loads, keeps_heads, why_not
from vlmprune_jax.core.mixers import NO_LAYER
from vlmprune_jax.core.models.vlm import encode, stack_module


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("AAAA", ["A*4"]),
        ("ABC", ["A*1", "B*1", "C*1"]),
        ("LLLF" * 8, ["LLLF*8"]),
        ("LLLF" * 3 + "LLF" + "LLLF" * 4, ["LLLF*3", "L*2", "F*1", "LLLF*4"]),
        ("SSSSSF" * 5 + "SSSS", ["SSSSSF*5", "S*4"]),
        ("SSSSSF" * 2, ["SSSSSF*2"]),
        ("AABAAB" + "B", ["AAB*2", "B*1"]),
        ("", []),
    ],
)
def test_the_fewest_blocks_are_compiled(layers, groups):
    """Equal neighbours are one run, alone and in every repetition of a pattern."""
    scans = scan_groups(tuple(layers))
    texts = ["".join(run.layer * (len(run.numbers) // scan.repetitions) for run in scan.runs) for scan in scans]
    assert [f"{text}*{scan.repetitions}" for text, scan in zip(texts, scans, strict=True)] == groups
    runs = layer_runs(tuple(layers))
    neighbours = sum(a != b for a, b in itertools.pairwise(layers)) + bool(layers)
    assert len(runs) == sum(len(scan.runs) for scan in scans) <= neighbours
    assert sorted(number for run in runs for number in run.numbers) == [*range(len(layers))]
    assert all(layers[number] == run.layer for run in runs for number in run.numbers)


WINDOWED, FULL = decoder_layer(4, 2, 12, 5), decoder_layer(4, 2, 12)
SHARING = (WINDOWED, FULL, WINDOWED, WINDOWED.reading(2), FULL.reading(1), WINDOWED.reading(2))


@pytest.mark.parametrize(
    ("numbers", "sources"),
    [
        (range(6), [None, None, None, 2, 1, 2]),
        ([1, 2, 3, 4], [None, None, 1, 0]),
        ([0, 1, 3, 5], [None, None, 0, 0]),  # layer 0 takes the place of layer 2
        ([1, 3, 4], [None, NO_LAYER, 0]),
    ],
)
def test_sources_follow_the_kept_layers(numbers, sources):
    kept = keep_layers(SHARING, list(numbers))
    assert [layer.mixer.source for layer in kept] == sources
    assert keep_layers(kept, range(len(kept))) == kept


def test_keys_come_from_the_source():
    """Layers 0 and 1 are alike and one scan; layer 3 reads the one that its config names, whatever layer 2 reads."""
    ids, outputs = np.arange(12, dtype=np.int32)[None], []
    for source in (0, 1):
        text = config((WINDOWED, WINDOWED, WINDOWED.reading(source))).text
        assert [text.supplies(number) for number in range(3)] == [source, source or None, None]
        both = model(config((WINDOWED, WINDOWED, WINDOWED.reading(1 - source), WINDOWED.reading(source))))
        assert scan_groups(both.cfg.text.layers)[0].runs[0].numbers == (0, 1)
        outputs.append(encode(both.params, both.cfg, ids)[0])
    assert float(abs(outputs[0] - outputs[1]).max()) > 1e-3


def test_layers_of_one_window_have_their_own_rotation():
    slow = changed(WINDOWED, {"rope": dataclasses.replace(WINDOWED.mixer.rope, theta=1e6)})
    cfg = config((WINDOWED, slow)).text
    patterns = stack_module("text", cfg).context(np.ones((1, 12), np.int32)).patterns
    first, second = (patterns[layer.mixer.pattern].rope[0] for layer in cfg.layers)
    assert float(abs(first - second).max()) > 0.1


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
    refused(r"loads_in='mine': .* could not load the pruned model: it has one number", check_loads, fewer, ["mine"])
    refused(r"loads_in 'mine2' is not one of .*; did you mean 'mine'", why_not, cfg, "mine2")
    always = dataclasses.replace(mine, always=mine.limits)
    monkeypatch.setitem(ENGINES, "mine", always)
    assert limits.why_no_class(fewer) == "it has one number of heads"
