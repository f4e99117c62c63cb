"""What a criterion can be, what its functions get, scores by kind of token, and what changes no score."""

import ast
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import EQUAL, UNEQUAL, assert_scores, batch, config, layer_scores, model, on_mesh, seeing, unit_scores
from refusal import refused
from repository import ROOT
from stack_cases import tower_layer

from vlmprune_jax.base.journal import Journal
from vlmprune_jax.core.models.params import unstack_layers
from vlmprune_jax.core.prune import CRITERIA, Criterion, Scores, score
from vlmprune_jax.core.prune.calibration import calibration_batches
from vlmprune_jax.core.prune.criteria import ANSWER, IMAGE, PADDING, PROMPT, gradients, input_weights, reduce_inputs
from vlmprune_jax.io.exports.pruning import make_plan


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


CFG = config(EQUAL, vision=True)
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


def test_unequal_layers_and_query_heads(own):
    scores = score(model(config(UNEQUAL)), [batch(config(UNEQUAL))], criterion="energy", gqa="q_heads")
    assert [len(heads) for heads in scores.along("q_heads")] == [4, 4, 8, 4]
    assert [len(neurons) for neurons in scores.along("mlp")] == [12, 12, 10, 12]
    layer = unstack_layers(model(config(UNEQUAL)).params, config(UNEQUAL))[0][2]
    norms = input_weights(model(config(UNEQUAL)), power=2)[2]
    np.testing.assert_allclose(norms["down_proj"], (layer["mlp/down_proj/weight"] ** 2).sum(0), rtol=1e-5)


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
    assert_scores(again, expected)
    complete = Journal(tmp_path / "j", {})
    assert len(complete.entries) == 3
    assert_scores(score(model(cfg), batches, criterion=criterion, journal=complete), expected)
    score(model(cfg), batches[:1], criterion="activation", journal=Journal(tmp_path / "none", {}))
    assert not (tmp_path / "none").exists()  # of criteria of ours that score no layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": ("heads",)}, "a criterion's scores: 'heads' is not one of layers, widths"),
        ({"needs": "gradients"}, "a criterion's needs: 'gradients' is not one of weights, activations, routing"),
        ({"finish": None}, 'a criterion with finish= .* must have needs="activations"'),
        ({"needs": "labels"}, 'a criterion with finish= .* must have needs="activations"'),
        ({"inputs": ("gate_proj",)}, "input 'gate_proj' is not one of self_attn, mlp, o_proj, down_proj, "),
        ({"options": {"powr": 2}}, "a criterion: option 'powr' is not a parameter of any of its functions"),
    ],
)
def test_descriptions_that_contradict_themselves(changes, message):
    refused(message, Criterion, **{**vars(OWN), **changes})


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
        refused(f"'mine' returns scores of shapes {message}", score, model(cfg), criterion="mine")


def test_no_criterion_is_known_by_name_elsewhere():
    """Names are in core/prune/criteria/ and, as defaults of settings, where these are declared."""
    home = ROOT / "vlmprune_jax/core/prune/criteria"
    declaring = [ROOT / "vlmprune_jax" / file for file in ("run/experiment/spec.py", "core/prune/config.py")]
    names, found = {"block_influence", "angular", "taylor", "l1", "param_first"}, []
    assert names - {"param_first"} <= set(CRITERIA)
    for path in sorted((ROOT / "vlmprune_jax").rglob("*.py")):
        if home in path.parents or path in declaring:
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
    labelled = {**arrays, "labels": arrays["labels"].clip(max=60)}
    for criterion in ("block_influence", "taylor"):
        batches = [{**labelled, "pixel_values": images} for images in (pixels, per_row)]
        assert_scores(*(score(model(cfg), [one], criterion=criterion) for one in batches))
    turned = score(model(cfg), [{**arrays, "pixel_values": pixels[::-1]}], criterion="block_influence")
    straight = score(model(cfg), [{**arrays, "pixel_values": pixels}], criterion="block_influence")
    assert (turned.layers != straight.layers).all()


def test_other_numbers_of_images_are_refused():
    for positions, fact in (
        ([(1, range(1, 5))], "input_ids have 4 image positions, but the images have 8 features"),
        ([], "input_ids have 0 image positions, but the images have 8 features"),
        ([(0, range(6)), (1, range(2))], "row 0 of input_ids has 6 image positions, not a multiple of the 4"),
    ):
        ids = np.ones((2, 9), int)
        for row, taken in positions:
            ids[row, list(taken)] = 61
        arrays = {"input_ids": ids, "attention_mask": np.ones((2, 9)), "pixel_values": np.zeros((2, 3, 6, 6))}
        refused(f"calibration batch 0: {fact}", score, model(CFG), [arrays], criterion="block_influence")


# --- scores by kind of token -----------------------------------------------------------------------------------------


OPTIONS = {"angular": {"layers_removed": 2}, "taylor": {"by_token_type": True, "variant": "vectorize"}}
SPLITTING = ("block_influence", "angular", "activation", "fluctuation", "taylor")


@functools.cache
def found(criterion, **weights):
    return score(model(CFG), [batch(CFG)], criterion=criterion, **OPTIONS.get(criterion, {}), **weights)


def flat(parts):
    parts = parts.values if isinstance(parts, Scores) else parts
    return np.concatenate([*parts.values()])


@pytest.mark.slow
@pytest.mark.parametrize("criterion", SPLITTING)
def test_scores_of_a_kind_are_the_scores_if_only_that_kind_counts(criterion):
    scores = found(criterion)
    assert list(scores.by_token_type) == ["image", "prompt", "answer"]
    only = {f"{kind}_weight": float(kind == "image") for kind in scores.by_token_type}
    np.testing.assert_allclose(flat(scores.by_token_type["image"]), flat(found(criterion, **only)), rtol=1e-6)
    apart = {flat(parts).tobytes() for parts in (scores, *scores.by_token_type.values())}
    assert len(apart) == (3 if criterion == "angular" else 4)  # a row's last token is of its answer


def test_weights_of_kinds_that_are_all_doubled_change_nothing_but_a_gradient():
    doubled = {f"{kind}_weight": 2.0 for kind in ("image", "prompt", "answer")}
    for criterion in ("block_influence", "activation"):
        np.testing.assert_allclose(flat(found(criterion, **doubled)), flat(found(criterion)), rtol=1e-6)
    np.testing.assert_allclose(flat(found("taylor", **doubled)), 2 * flat(found("taylor")), rtol=1e-6)


def test_shares_of_kinds_add_up_to_the_gradient():
    batches = calibration_batches([batch(CFG)], CFG, labels=True)
    options = {"rows_per_step": 2, "memory_budget": 0, "by_token_type": True}
    layers, kinds = gradients.gradient_channels(model(CFG), batches, lambda w, g, a, axis: g, **options)
    added = jax.tree.map(lambda *shares: sum(shares), *kinds.values())
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-7, rtol=1e-4), added, layers)


def test_text_has_two_kinds_and_one_kind_is_not_told_apart():
    cfg = config(EQUAL)
    arrays = batch(cfg)
    assert list(score(model(cfg), [arrays], criterion="block_influence").by_token_type) == ["prompt", "answer"]
    unlabelled = {name: array for name, array in arrays.items() if name != "labels"}
    assert score(model(cfg), [unlabelled], criterion="block_influence").by_token_type == {}
    assert not score(model(cfg), [arrays], criterion="block_influence", reference_compat=True).by_token_type
    nothing = {"prompt_weight": 0, "answer_weight": 0}
    refused("contain only padding", score, model(cfg), [arrays], criterion="block_influence", **nothing)
    refused("has no option 'image_weight'", score, model(cfg), criterion="l1", image_weight=0.5)


def test_a_criterion_that_weighs_nothing_is_not_split(monkeypatch):
    own = dataclasses.replace(
        CRITERIA["block_influence"], function=lambda layer, tokens: {"one": jnp.float32(1)},
        finish=lambda sums, model: layer_scores([layer["one"] for layer in sums]), options={}, splits=False,
    )  # fmt: skip
    monkeypatch.setitem(CRITERIA, "own", own)
    assert score(model(CFG), [batch(CFG)], criterion="own").by_token_type == {}
    refused("reads no tokens", dataclasses.replace, CRITERIA["l1"], splits=True)


# --- what changes no score: how calibration rows are cut, ordered and padded, and the mesh ---------------------------


ONE = seeing((tower_layer(2, 2, 10),) * 3)
NOTHING = 8  # the number of a row of padding behind eight rows, of which the last has no image
ROWS = {
    name: np.concatenate([array, np.full_like(array[:1], -100 if name == "labels" else 0)])
    for name, array in batch(ONE.cfg, rows=8).items()
}
ROWS["labels"][:, 0] = -100  # nothing predicts the first token, unless padding is before it
SETTINGS = {
    "angular": {"layers_removed": 2}, "taylor": {"variant": "param_mix"}, "greedy_loss": {"candidates": 2, "search": 3}
}  # fmt: skip
ALL = [(name, stack) for name, one in CRITERIA.items() if one.scores != ("experts",) for stack in one.stacks]


def scores_of(one, criterion, stack, batches):
    return score(one, batches, criterion=criterion, stack=stack, **SETTINGS.get(criterion, {}))


@functools.cache
def scores_in_order(criterion, stack):
    last = 7 if stack == "text" else NOTHING
    return scores_of(ONE, criterion, stack, [taken([0, 1, 2, 3]), taken([4, 5, 6, last])])


def assert_near(found, expected):
    for key, values in expected.values.items():
        largest = np.abs(values[np.isfinite(values)]).max()
        np.testing.assert_allclose(found.values[key], values, rtol=2e-4, atol=1e-6 * largest, err_msg=str(key))


def taken(rows, left=False):
    """Some rows as a batch, on request with their padding on the left."""
    found = {name: array[rows] for name, array in ROWS.items()}
    if left:
        shifts = 9 - found["attention_mask"].sum(axis=1)
        for name in ("input_ids", "attention_mask", "labels"):
            found[name] = np.stack([np.roll(row, shift) for row, shift in zip(found[name], shifts, strict=True)])
    return found


@pytest.mark.parametrize(("criterion", "stack"), ALL)
def test_rows_may_be_cut_ordered_and_padded_in_any_way(criterion, stack, tmp_path):
    """And a plan is made from the scores in their file."""
    text = {name: array for name, array in taken([NOTHING, 7, NOTHING, NOTHING]).items() if name != "pixel_values"}
    batches = [taken([6, 1, 4, 0], left=True), text, taken([5, NOTHING, 3, 2]), taken([NOTHING] * 4)]
    found = scores_of(ONE, criterion, stack, batches)
    assert_near(found, scores_in_order(criterion, stack))
    found.save(tmp_path / "scores.npz")
    again = Scores.load(tmp_path / "scores.npz")
    assert_scores(again, found)
    assert (again.components, again.criterion) == ((stack,), criterion)
    depth = {"method": "depth", "layers_removed": 2 if criterion == "angular" else 1}
    plan = make_plan(again, ONE.cfg, **({"method": "width", "ratio": 0.02} if again.axes else depth))
    assert {name for name, kept in plan.stacks.items() if not kept.is_whole} == {stack}


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "stack"), ALL)
def test_a_mesh_gives_the_same_scores(criterion, stack):
    batches = [taken([0, 1, 2]), taken(range(3, 8 if stack == "text" else 7))]
    assert_near(scores_of(on_mesh(ONE, 2, 2, 2), criterion, stack, batches), scores_in_order(criterion, stack))
