"""What a criterion can be, what its functions get, and that nothing outside prune/criteria/ knows one by name."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import decoder_values
from flax import nnx
from media_cases import packed
from prune_cases import EQUAL, UNEQUAL, batch, config, layer_scores, model, on_mesh, unit_scores
from repository import ROOT

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.journal import Journal
from vlmprune_jax.core.models.params import unstack_layers
from vlmprune_jax.core.models.vlm import forward, to_nnx
from vlmprune_jax.core.prune import CRITERIA, Criterion, score
from vlmprune_jax.core.prune.calibration import calibration_batches
from vlmprune_jax.core.prune.criteria import ANSWER, IMAGE, PADDING, PROMPT, input_weights, reduce_inputs

PHI = {"parallel": True, "norm": "layer", "gated": False}


@pytest.mark.slow
def test_a_tap_sees_what_the_output_projections_read():
    """A block's output is its input and the two products; the same in a parallel block with other names."""
    for cfg in (config(UNEQUAL, vision=True), config(UNEQUAL, **PHI)):
        one, arrays = model(cfg), batch(cfg)
        ids, mask, pixels = arrays["input_ids"], arrays["attention_mask"], arrays.get("pixel_values")
        blocks = decoder_values(
            jax.tree.map(jnp.asarray, one.params), cfg, jnp.asarray(ids), ("o_proj", "down_proj"),
            attention_mask=jnp.asarray(mask), media={} if pixels is None else {"vision": packed(pixels)},
        )  # fmt: skip
        _, wanted = forward(one, ids, pixel_values=pixels, attention_mask=mask, capture=("hidden",))
        names = ("dense", "fc2") if cfg.text.block.parallel else ("o_proj", "down_proj")
        for i, (block, shape) in enumerate(zip(blocks, cfg.text.layers, strict=True)):
            assert block.inputs["o_proj"].shape == (4, 9, shape.mixer.q_heads, 6)
            params = nnx.to_pure_dict(nnx.state(block.block))
            out, down = params["self_attn"][names[0]], params["mlp"][names[1]]
            added = jnp.einsum("bthd,ehd->bte", block.inputs["o_proj"], out["weight"]) + out["bias"][None, None]
            added += jnp.einsum("btm,em->bte", block.inputs["down_proj"], down["weight"]) + down["bias"][None, None]
            last = i == len(cfg.text.layers) - 1
            after = to_nnx(one).text.final_norm(block.before + added) if last else block.before + added
            np.testing.assert_allclose(block.before, wanted["hidden"][i], atol=1e-5)
            np.testing.assert_allclose(block.after, wanted["hidden"][i + 1], atol=1e-5)
            np.testing.assert_allclose(after, block.after, atol=1e-5)


def test_kinds_of_tokens():
    cfg = config(EQUAL, vision=True)
    ids = np.array([[3, 61, 61, 61, 61, 5, 6, 0]])
    arrays = {
        "input_ids": ids,
        "attention_mask": np.array([[1, 1, 1, 1, 1, 1, 1, 0]]),
        "labels": np.array([[-100, -100, -100, -100, -100, -100, 6, -100]]),
        "pixel_values": np.zeros((1, 3, 6, 6)),
    }
    (checked,) = calibration_batches([arrays], cfg, labels=False)
    assert checked["token_types"].tolist() == [[PROMPT, IMAGE, IMAGE, IMAGE, IMAGE, PROMPT, ANSWER, PADDING]]
    (checked,) = calibration_batches([{**arrays, "labels": None}], cfg, labels=False)
    assert checked["token_types"].tolist() == [[PROMPT, IMAGE, IMAGE, IMAGE, IMAGE, PROMPT, PROMPT, PADDING]]


# --- a criterion of one's own ----------------------------------------------------------------------------------------


def energy(layer, tokens, *, power):
    """Sums of |x|^power over answers, with what was counted."""
    answers = (tokens.token_type == ANSWER).astype(jnp.float32)
    sums = {name: jnp.tensordot(answers, jnp.abs(x) ** power, 2) for name, x in layer.inputs.items()}
    return {**sums, "answers": answers.sum()}


def mean_energy(sums, model, *, gqa):
    norms = input_weights(model, power=2)
    layers = [
        {name: layer[name] / layer["answers"] * norm[name] for name in norm}
        for layer, norm in zip(sums, norms, strict=True)
    ]
    return reduce_inputs(layers, model.cfg, gqa=gqa)


OWN = Criterion(
    scores=("widths",),
    needs="activations",
    function=energy,
    finish=mean_energy,
    options={"power": 2, "gqa": "groups"},
    inputs=("o_proj", "down_proj"),
)


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(CRITERIA, "energy", OWN)


def assert_equal(mine, others, **tolerance):
    for one, other in zip(mine.values.values(), others.values.values(), strict=True):
        np.testing.assert_allclose(one, other, **{"rtol": 0, **tolerance})


@pytest.mark.slow
def test_padding_batching_and_a_mesh_do_not_change_it(own):
    cfg = config(EQUAL, vision=True)
    arrays = batch(cfg, rows=8)
    expected = score(model(cfg), [arrays], criterion="energy")
    apart = [{name: array[i : i + 4] for name, array in arrays.items()} for i in (0, 4)]
    filler = {**{name: np.zeros_like(array) for name, array in arrays.items()}, "labels": np.full((8, 9), -100)}
    assert_equal(score(model(cfg), [*apart, filler], criterion="energy"), expected, rtol=1e-5)
    assert_equal(score(on_mesh(model(cfg), 2, 2, 2), [arrays], criterion="energy"), expected, rtol=1e-5)


def test_unequal_layers_and_query_heads(own):
    scores = score(model(config(UNEQUAL)), [batch(config(UNEQUAL))], criterion="energy", gqa="q_heads")
    assert [len(heads) for heads in scores.along("q_heads")] == [4, 4, 8, 4]
    assert [len(neurons) for neurons in scores.along("mlp")] == [12, 12, 10, 12]
    layer = unstack_layers(model(config(UNEQUAL)).params, config(UNEQUAL))[0][2]
    np.testing.assert_allclose(
        input_weights(model(config(UNEQUAL)), power=2)[2]["down_proj"],
        (layer["mlp/down_proj/weight"] ** 2).sum(0),
        rtol=1e-5,
    )


@pytest.mark.parametrize("criterion", ["block_influence", "energy"])
def test_an_interrupted_pass_continues_from_its_journal(own, tmp_path, criterion):
    cfg = config(UNEQUAL)
    batches = [batch(cfg, seed=seed) for seed in range(3)]
    expected = score(model(cfg), batches, criterion=criterion)

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model(cfg), batches, criterion=criterion, progress=stop, journal=Journal(tmp_path / "j", {}))
    # what the journal has is not computed again: the first two batches may be any others
    others = [batch(cfg, seed=7), batch(cfg, seed=8), batches[2]]
    again = score(model(cfg), others, criterion=criterion, journal=Journal(tmp_path / "j", {}))
    assert_equal(again, expected)
    complete = Journal(tmp_path / "j", {})
    assert len(complete.entries) == 3
    assert_equal(score(model(cfg), batches, criterion=criterion, journal=complete), expected)


def test_a_criterion_of_ours_that_scores_no_layers_leaves_no_journal(tmp_path):
    cfg = config(EQUAL)
    score(model(cfg), [batch(cfg)], criterion="activation", journal=Journal(tmp_path / "j", {}))
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": ("heads",)}, "a criterion's scores: 'heads' is not one of layers, widths"),
        (
            {"needs": "gradients"},
            "a criterion's needs: 'gradients' is not one of weights, activations, routing, labels",
        ),
        ({"finish": None}, 'a criterion with finish= .* must have needs="activations"'),
        ({"needs": "labels"}, 'a criterion with finish= .* must have needs="activations"'),
        ({"inputs": ("gate_proj",)}, "input 'gate_proj' is not one of self_attn, mlp, o_proj, down_proj, "),
        ({"options": {"powr": 2}}, "a criterion: option 'powr' is not a parameter of any of its functions"),
    ],
)
def test_descriptions_that_contradict_themselves(changes, message):
    with pytest.raises(UserError, match=message):
        Criterion(**{**vars(OWN), **changes})


def test_scores_of_another_kind_or_shape_are_refused(monkeypatch):
    cfg = config(EQUAL)
    units = unit_scores((np.zeros(2),) * 5, (np.zeros(11),) * 5)
    for scores, parts, message in (
        (("layers",), units, r".*'text/0/mlp': \(11,\).*, expected shapes among {'text/layers': \(5,\)}"),
        (("layers",), layer_scores(np.zeros(4)), r"{'text/layers': \(4,\)}, expected .*: \(5,\)"),
        (("widths",), {}, "{}, expected shapes among {'text/0/kv_heads'"),
        (("widths",), units, r".*'text/0/mlp': \(11,\).*, expected .*'text/0/mlp': \(12,\)"),
    ):
        monkeypatch.setitem(CRITERIA, "mine", Criterion(scores, "weights", lambda model, parts=parts: parts))
        with pytest.raises(UserError, match=f"'mine' returns scores of shapes {message}"):
            score(model(cfg), criterion="mine")


def test_no_criterion_is_known_by_name_elsewhere():
    """Names are in core/prune/criteria/ and, as defaults of settings, where these are declared."""
    home = ROOT / "vlmprune_jax/core/prune/criteria"
    names, found = {"block_influence", "angular", "taylor", "l1", "param_first"}, []
    assert names - {"param_first"} <= set(CRITERIA)
    for path in sorted((ROOT / "vlmprune_jax").rglob("*.py")):
        if home in path.parents or path in (
            ROOT / "vlmprune_jax/run/experiment/spec.py",
            ROOT / "vlmprune_jax/core/prune/config.py",
        ):
            continue
        constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        found += [f"{path.relative_to(ROOT)}:{node.lineno}" for node in constants if node.value in names]
    assert not found


# --- pixels as `forward` takes them ----------------------------------------------------------------------------------


def test_pixels_in_order_of_appearance():
    cfg = config(EQUAL, vision=True)
    arrays = batch(cfg)  # three rows with an image, one without
    arrays["input_ids"][1, 5:9] = 61  # and a second image in row 1
    pixels = np.random.default_rng(5).standard_normal((4, 3, 6, 6)).astype(np.float32)
    per_row = np.zeros((4, 2, 3, 6, 6), np.float32)
    per_row[0, 0], per_row[1, 0], per_row[1, 1], per_row[2, 0] = pixels
    for criterion in ("block_influence", "taylor"):
        flat, rows = (
            score(model(cfg), [{**arrays, "labels": arrays["labels"].clip(max=60), "pixel_values": p}],
                  criterion=criterion)
            for p in (pixels, per_row)
        )  # fmt: skip
        if criterion == "taylor":
            assert_equal(flat, rows)
        else:
            np.testing.assert_array_equal(flat.layers, rows.layers)
    turned = score(model(cfg), [{**arrays, "pixel_values": pixels[::-1]}], criterion="block_influence")
    straight = score(model(cfg), [{**arrays, "pixel_values": pixels}], criterion="block_influence")
    assert (turned.layers != straight.layers).all()


@pytest.mark.parametrize(
    ("images", "positions", "message"),
    [
        (2, slice(1, 5), "input_ids have 4 image positions, but the images have 8 features"),
        (2, slice(0, 0), "input_ids have 0 image positions, but the images have 8 features"),
    ],
)
def test_other_numbers_of_images_are_refused(images, positions, message):
    cfg = config(EQUAL, vision=True)
    ids = np.ones((2, 9), int)
    ids[1, positions] = 61
    arrays = {"input_ids": ids, "attention_mask": np.ones((2, 9)), "pixel_values": np.zeros((images, 3, 6, 6))}
    with pytest.raises(UserError, match=f"calibration batch 0: {message}"):
        score(model(cfg), [arrays], criterion="block_influence")


def test_a_torn_image_is_refused():
    cfg = config(EQUAL, vision=True)
    ids = np.ones((2, 9), int)
    ids[0, :6] = ids[1, :2] = 61
    arrays = {"input_ids": ids, "attention_mask": np.ones((2, 9)), "pixel_values": np.zeros((2, 3, 6, 6))}
    with pytest.raises(UserError, match="row 0 of input_ids has 6 image positions, not a multiple of the 4"):
        score(model(cfg), [arrays], criterion="block_influence")
