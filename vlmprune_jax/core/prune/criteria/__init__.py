"""Criteria that score layers, heads, neurons and experts, by name."""

from vlmprune_jax.core.part import Key
from vlmprune_jax.core.prune.activations import LayerValues, Tokens
from vlmprune_jax.core.prune.calibration import ANSWER, IMAGE, PADDING, PROMPT, VIDEO
from vlmprune_jax.core.prune.config import CRITERIA
from vlmprune_jax.core.prune.criteria.criterion import Criterion
from vlmprune_jax.core.prune.criteria.distance import ANGULAR, BLOCK_INFLUENCE
from vlmprune_jax.core.prune.criteria.gradients import gradient_channels
from vlmprune_jax.core.prune.criteria.greedy import GREEDY_LOSS
from vlmprune_jax.core.prune.criteria.groups import coupled, reduce_groups, reduce_inputs
from vlmprune_jax.core.prune.criteria.routed import EXPERT_FREQUENCY, EXPERT_NORM, MAN, MSAN, REAP
from vlmprune_jax.core.prune.criteria.taylor import TAYLOR
from vlmprune_jax.core.prune.criteria.weights import ACTIVATION, FLUCTUATION, L1, L2, RANDOM, input_weights

CRITERIA.fill(
    Criterion,
    {
        "block_influence": BLOCK_INFLUENCE,
        "angular": ANGULAR,
        "greedy_loss": GREEDY_LOSS,
        "taylor": TAYLOR,
        "activation": ACTIVATION,
        "fluctuation": FLUCTUATION,
        "expert_frequency": EXPERT_FREQUENCY,
        "expert_norm": EXPERT_NORM,
        "reap": REAP,
        "man": MAN,
        "msan": MSAN,
        "l1": L1,
        "l2": L2,
        "random": RANDOM,
    },
)


def scoring(what: str) -> str:
    """Return the names of criteria that score "layers", "widths" or "experts", as text such as `a or b or c`."""
    return " or ".join(name for name, criterion in CRITERIA.items() if what in criterion.scores)


__all__ = [
    "ANSWER",
    "CRITERIA",
    "IMAGE",
    "PADDING",
    "PROMPT",
    "VIDEO",
    "Criterion",
    "Key",
    "LayerValues",
    "Tokens",
    "coupled",
    "gradient_channels",
    "input_weights",
    "reduce_groups",
    "reduce_inputs",
    "scoring",
]
