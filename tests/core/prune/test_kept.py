"""Kept layers and tokens: what they refuse, and two prunings as one."""

import pytest
from prune_cases import EQUAL, config, kept_stack, kept_units
from stack_cases import decoder_layer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.plans.kept import KeptLayer, KeptStack, KeptVocabulary

BEFORE = (decoder_layer(6, 3, 10), decoder_layer(4, 2, 8), decoder_layer(6, 3, 10))
FIRST = kept_stack(BEFORE, (kept_units(0, (0, 1, 4, 5), (0, 2), (1, 3, 8)), KeptLayer.whole(2, BEFORE[2])))


def test_a_stack_pruned_twice_is_one_stack_in_original_numbers():
    second = KeptStack(FIRST.sizes, (kept_units(0, (2, 3), (1,), (0, 2)),))
    assert FIRST.then(second) == kept_stack(BEFORE, (kept_units(0, (4, 5), (2,), (1, 8)),))
    assert KeptStack.whole(BEFORE).then(FIRST) == FIRST == FIRST.then(KeptStack.whole(FIRST.of(BEFORE)))
    assert (FIRST.kept_layers, FIRST.removed_layers) == ((0, 2), (1,))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "no layer is kept"),
        ((KeptLayer.whole(2, BEFORE[2]), KeptLayer.whole(0, BEFORE[0])), r"kept layers \[2, 0\] are not increasing"),
        (
            (kept_units(1, (0, 4), (0, 1), (0,)),),
            "query heads of layer 1 are not increasing numbers below 4, at least one",
        ),
        ((kept_units(1, (0, 1), (0,), ()),), "neurons of layer 1 are not increasing numbers below 8, at least one"),
        ((kept_units(1, (0, 1, 2), (0, 1), (0,)),), r"keeps query heads \[0, 1, 2\] that do not share its .* evenly"),
    ],
)
def test_stacks_refuse(layers, message):
    with pytest.raises(UserError, match=f"prune plan: .*{message}"):
        kept_stack(BEFORE, layers)


def test_a_vocabulary_trimmed_twice_is_one_vocabulary_in_original_ids():
    first, second = KeptVocabulary(10, (0, 2, 3, 7), "first"), KeptVocabulary(4, (1, 3), "second")
    assert first.then(second) == KeptVocabulary(10, (2, 7), "first")
    with pytest.raises(UserError, match="the second plan is for another vocabulary than the first plan leaves"):
        first.then(first)


@pytest.mark.parametrize("kept", [(), (3, 2), (700,)])
def test_vocabularies_refuse(kept):
    with pytest.raises(UserError, match=r"kept tokens .* are not ascending ids below 640"):
        KeptVocabulary(640, kept, "")


def test_a_vocabulary_of_another_size_is_refused():
    cfg = config(EQUAL)
    with pytest.raises(UserError, match=f"the plan's vocabulary has 9 rows, this model's {cfg.text.vocab_size}"):
        KeptVocabulary(9, (1, 2), "").apply_to(cfg)
