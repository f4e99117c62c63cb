"""Kept layers and tokens: what they refuse, and two prunings as one."""

import pytest
from prune_cases import EQUAL, config, hand_plan, kept_units
from stack_cases import decoder_layer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.plans.kept import KeptLayer, KeptVocabulary
from vlmprune_jax.core.prune import compose

BEFORE = (decoder_layer(6, 3, 10), decoder_layer(4, 2, 8), decoder_layer(6, 3, 10))
CFG = config(BEFORE)
FIRST = hand_plan(CFG, text=[kept_units(0, (0, 1, 4, 5), (0, 2), (1, 3, 8)), KeptLayer.whole(2, BEFORE[2])])


def test_a_stack_pruned_twice_is_one_stack_in_original_numbers():
    after = FIRST.apply_to(CFG)
    second = hand_plan(after, text=[kept_units(0, (2, 3), (1,), (0, 2))])
    assert compose(FIRST, second).stacks == hand_plan(CFG, text=[kept_units(0, (4, 5), (2,), (1, 8))]).stacks
    assert compose(hand_plan(CFG), FIRST).kept == FIRST.kept == compose(FIRST, hand_plan(after)).kept
    assert (FIRST.kept_layers, FIRST.removed_layers) == ((0, 2), (1,))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), r"text/layers: kept layers \[\] are not increasing numbers below 3, at least one"),
        ((KeptLayer.whole(2, BEFORE[2]), KeptLayer.whole(0, BEFORE[0])), r"kept layers \[2, 0\] are not increasing"),
        (
            (kept_units(1, (0, 4), (0, 1), (0,)),),
            r"text/1/q_heads: kept query heads \[0, 4\] are not increasing numbers below 4, at least one",
        ),
        ((kept_units(1, (0, 1), (0,), ()),), r"kept neurons \[\] are not increasing numbers below 8, at least one"),
        ((kept_units(1, (0, 1, 2), (0, 1), (0,)),), r"keeps query heads \[0, 1, 2\] that do not share its .* evenly"),
    ],
)
def test_plans_refuse(layers, message):
    with pytest.raises(UserError, match=f"prune plan: .*{message}"):
        hand_plan(CFG, text=layers)


@pytest.mark.parametrize("kept", [(), (3, 2), (700,)])
def test_vocabularies_refuse(kept):
    with pytest.raises(UserError, match=r"text/vocab: kept tokens .* are not increasing numbers below 640"):
        hand_plan(CFG).trimming(KeptVocabulary(640, kept, ""))


def test_a_vocabulary_of_another_size_is_refused():
    cfg = config(EQUAL)
    with pytest.raises(UserError, match=f"the plan's vocabulary has 9 rows, this model's {cfg.text.vocab_size}"):
        KeptVocabulary(9, (1, 2), "").apply_to(cfg)
