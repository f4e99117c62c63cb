"""Starting points of a config: the reference's recovery of each family, by the family's name, and the paper's cuts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.checks import fraction, one_of, suggest
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.families import FAMILIES

# Layers that the paper's code removes of 32 for the ratios of its tables, which are nominal: 12 to 14 % of the whole
# model for 15 %, and so on.
PAPER_LAYERS = {0.15: 5, 0.3: 10, 0.45: 15, 0.6: 20}


def recipes() -> dict[str, Mapping[str, Any]]:
    """Return {family name: recipe (a partial experiment)} for the families that have one."""
    return {family.name: family.recipe for family in FAMILIES.values() if family.recipe is not None}


def recipe(name: str) -> Mapping[str, Any]:
    """Return the settings of a recipe as a nested mapping, from which a config or variant starts."""
    known = recipes()
    if name not in known:
        raise UserError(f"no recipe {name!r}{suggest(name, known)}")
    return known[name]


def paper_cut(
    variant: str,
    *,
    attn_layers: tuple[int, int] = (3, 31),
    mlp_layers: tuple[int, int] = (4, 30),
    longest_text: int = 128,
) -> dict[str, dict[str, Any]]:
    """Return sections `score` and `prune` for a pruning setup of the paper: "depth,0.3", "width,0.3,uniform".

    Depth goes by Block Influence of 50 records; the ratios of the tables are numbers of layers (`PAPER_LAYERS`), others
    shares of the whole model. Width goes by first-order Taylor importance of 10 records, by shares of the whole model;
    the first and last layers stay whole, but with "uniform", which stock transformers loads at its true size. The
    ranges of the reference's example script, [3, 21) and [3, 20), cannot give the published 60 %; these can.

    Args:
      attn_layers, mlp_layers: layers that lose heads and neurons, half-open, of 32.
      longest_text: tokens of a calibration record for Taylor.

    Raises:
      UserError: another form, an unknown method or option, a ratio outside of 0 to 1.
    """
    method, _, rest = variant.partition(",")
    text, comma, layers = rest.partition(",")
    one_of("method of the variant", method, ("depth", "width"))
    try:
        ratio = fraction("ratio of the variant", float(text))
    except ValueError:
        raise UserError(f"variant {variant!r} must be METHOD,RATIO, as depth,0.3 or width,0.45") from None
    if comma:
        one_of("layers of the variant", layers, ("uniform",) if method == "width" else ())
    if method == "depth":
        target = {"layers_removed": PAPER_LAYERS[ratio]} if ratio in PAPER_LAYERS else {"ratio": ratio}
        return {
            "score": {"samples": 50, "batch_size": 1},
            "prune": {"method": "depth", **target},
        }
    ranges = {} if layers else {"attn_layers": attn_layers, "mlp_layers": mlp_layers}
    return {
        "score": {"reduction": "sum", "longest_text": longest_text, "samples": 10, "batch_size": 10},
        "prune": {"method": "width", "ratio": ratio, "heads": "proportional", **ranges},
    }
