"""Greedy generation against the reference's tokens, and against repeated full forwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from refusal import refused
from repository import load_arrays
from stack_cases import decoder_layer, text_config

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models import kernels
from vlmprune_jax.core.models.generate import SharedPrefix, generate, prefill
from vlmprune_jax.core.models.params import init_params, param_shapes, unflatten
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.io.checkpoints.read import load

IMAGE, PATCHES = 400, 16


@pytest.fixture(scope="module")
def llava(goldens):
    return load(goldens / "ckpt/llava_hf")


def expand(ids):
    return [i for token in ids for i in ([IMAGE] * PATCHES if token == -200 else [int(token)])]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_tokens_of_the_reference(llava, goldens, padding):
    golden = load_arrays(goldens / "forward/llava.npz")
    rows = [0] if padding == "none" else [0, 1]
    prompts = [expand(golden["input_ids"][row][: golden["gen_prompt_len"][row]]) for row in rows]
    length = max(map(len, prompts)) + 3 * (padding != "none")
    ids, mask = np.zeros((2, len(rows), length), int)
    for row, prompt in enumerate(prompts):
        place = slice(len(prompt)) if padding == "right" else slice(length - len(prompt), None)
        ids[row, place], mask[row, place] = prompt, 1
    inputs = {"pixel_values": golden["pixel_values"][rows], "attention_mask": mask}
    tokens = generate(llava, ids, **inputs, max_new_tokens=8, eos_token_ids=())
    np.testing.assert_array_equal(tokens, golden["gen_tokens"][rows])


def test_text_only_and_grouped_queries(llava, goldens):
    golden = load_arrays(goldens / "forward/llava.npz")
    tokens = generate(llava, golden["gen_text_prompt"][None], max_new_tokens=8, eos_token_ids=())
    np.testing.assert_array_equal(tokens[0], golden["gen_text_tokens"])
    golden = load_arrays(goldens / "forward/llama_gqa.npz")
    prompt = golden["input_ids"][0][golden["attention_mask"][0] == 1]
    tokens = generate(load(goldens / "ckpt/llama_gqa"), prompt[None], max_new_tokens=8, eos_token_ids=())
    np.testing.assert_array_equal(tokens[0], golden["gen_tokens"])


@pytest.mark.parametrize(("lanes", "count"), [(8, 7), (14, 6), (128, 5)])  # no other test compiles for as many tokens
def test_a_cache_as_on_tpus_gives_the_same_tokens(lanes, count, llava, goldens, monkeypatch):
    """Eight heads of 6 channels: one, two and all of them in each padded row."""
    golden, compiled_for = load_arrays(goldens / "forward/llava.npz"), []
    monkeypatch.setattr(kernels, "for_tpu", lambda: compiled_for.append("tpu") or True)
    monkeypatch.setattr(kernels, "LANES", lanes)
    tokens = generate(llava, golden["gen_text_prompt"][None], max_new_tokens=count, eos_token_ids=())
    np.testing.assert_array_equal(tokens[0], golden["gen_text_tokens"][:count])
    assert compiled_for


def test_shared_prefix_equals_whole_prompts(llava, goldens):
    rng = np.random.default_rng(0)
    pixels = load_arrays(goldens / "forward/llava.npz")["pixel_values"]
    prefix = np.concatenate([rng.integers(5, 390, (3, 2)), np.full((3, PATCHES), IMAGE), [[7], [8], [9]]], axis=1)
    prefix_mask = np.ones_like(prefix)
    prefix_mask[1, 0] = 0
    rest = rng.integers(5, 390, (7, 5))
    mask = np.ones_like(rest)
    mask[2, :2] = 0
    mask[4, 3:] = 0
    rows = np.array([0, 0, 1, 2, 1, 2, 0])
    options = {"max_new_tokens": 6, "eos_token_ids": ()}
    beginning = SharedPrefix(prefix, prefix_mask, rows)
    shared = generate(llava, rest, attention_mask=mask, pixel_values=pixels, prefix=beginning, **options)
    ids, mask = np.concatenate([prefix[rows], rest], axis=1), np.concatenate([prefix_mask[rows], mask], axis=1)
    whole = generate(llava, ids, attention_mask=mask, pixel_values=pixels[rows], **options)
    np.testing.assert_array_equal(shared, whole)


def test_end_token_is_kept_then_padding(llava, goldens):
    golden = load_arrays(goldens / "forward/llava.npz")
    expected = golden["gen_text_tokens"]
    end = int(expected[2])
    tokens = generate(llava, golden["gen_text_prompt"][None], max_new_tokens=8, eos_token_ids=(end,))[0]
    np.testing.assert_array_equal(tokens[:3], expected[:3])
    assert set(tokens[3:]) == {llava.cfg.pad_token_id}
    prompts = np.stack([golden["gen_text_prompt"], golden["gen_text_prompt"][::-1]])  # the second row goes on
    rows = generate(llava, prompts, max_new_tokens=8, eos_token_ids=(end,))
    np.testing.assert_array_equal(rows[0], tokens)
    assert end not in rows[1]


def test_sliding_window_across_a_shared_prefix():
    """Padding between the prefix and its rows takes no place in a window: 4 keys are seen, however far they are."""
    text = text_config((decoder_layer(4, 2, 20, window=4), decoder_layer(4, 2, 20, window=6)), max_positions=64)
    cfg = ModelConfig("llama", "transformers", text)
    model = Model(init_params(cfg, jax.random.key(0), jnp.float32), cfg)
    draw = np.random.default_rng(1)
    prefix, rest = draw.integers(0, 50, (2, 7)), draw.integers(0, 50, (4, 5))
    prefix_mask, mask, rows = np.ones_like(prefix), np.ones_like(rest), np.array([0, 1, 1, 0])
    prefix_mask[1, :2] = 0
    mask[1, :3] = mask[2, 1:] = 0  # 3 empty slots behind the prefix; 4, once the row is moved to the right
    shared = SharedPrefix(prefix, prefix_mask, rows)
    tokens = generate(model, rest, attention_mask=mask, prefix=shared, max_new_tokens=6, eos_token_ids=())
    for row, first in enumerate(rows):
        whole = [*prefix[first][prefix_mask[first] == 1], *rest[row][mask[row] == 1]]
        for token in tokens[row]:
            ids = np.array([whole + [0] * (18 - len(whole))])  # padding behind all of it is never looked at
            assert np.asarray(forward(model, ids)[0])[0, len(whole) - 1].argmax() == token
            whole.append(int(token))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"attention_mask": np.zeros((1, 3), int)}, "row 0 of the prompts contains only padding"),
        ({"attention_mask": np.full((1, 3), 2)}, "attention_mask has values up to 2, expected 0 and 1"),
        ({"input_ids": np.array([[1, 2, 99999]])}, "outside the vocabulary of 416"),
        ({"input_ids": np.array([[1, IMAGE, 2]])}, "pixel_values is missing"),
    ],
)
def test_bad_input(llava, change, message):
    arguments = {"input_ids": np.array([[1, 2, 3]]), "max_new_tokens": 2, **change}
    refused(message, generate, llava, arguments.pop("input_ids"), **arguments)


def test_layers_are_read_from_the_stack_of_all():
    """A scan over repetitions of a pattern does not slice their weights, which would be a copy for every token."""
    layers = (decoder_layer(2, 2, 64), decoder_layer(2, 2, 64), decoder_layer(2, 2, 32)) * 2
    cfg = ModelConfig("llama", "transformers", text_config(layers))
    params = unflatten({path: jax.ShapeDtypeStruct(size, np.float32) for path, size in param_shapes(cfg).items()})
    arrays = {name: jax.ShapeDtypeStruct((1, 5), np.int32) for name in ("ids", "valid")}
    arrays |= {"ended": jax.ShapeDtypeStruct((1,), bool)}
    traced = prefill.trace(params, cfg, arrays, 4, ()).jaxpr
    scans = _scans(traced.jaxpr)
    sliced = [x for eqn in scans for x in eqn.invars[eqn.params["num_consts"] + eqn.params["num_carry"] :]]
    assert len(scans) == 2  # repetitions, and equal neighbours
    assert sliced
    assert max(x.aval.ndim for x in sliced) <= 2  # numbers of layers


def _scans(jaxpr):
    inner = [sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"] + [eqn for sub in inner for eqn in _scans(sub)]
