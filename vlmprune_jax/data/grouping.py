"""The order of training records in which the rows of a batch are alike in length, and perhaps in modality."""

from __future__ import annotations

import numpy as np

GROUPINGS = ("none", "length", "modality_length")
MEGABATCH = 50  # batches whose rows are sorted together, as `mega_batch_mult` of transformers' `group_by_length`


def grouped_order(sizes: np.ndarray, *, group_by: str, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return int64[records], the record numbers of one epoch in order; each once, a function of the arguments alone.

    Records are permuted, per modality with "modality_length" (LLaVA), and cut into megabatches; inside one they are
    sorted by length and cut into batches, and the batches of all megabatches are permuted, the longest row's first, so
    that a batch that does not fit in memory is met at once. What fills no batch comes last. LLaVA's own megabatch is
    one batch, which keeps modalities apart but pads as much as no grouping.

    Batches run on across epochs: an epoch begins with the records that fill up the last one's open batch.

    Args:
      sizes: int[records, ...], tokens and image slots first (`measure.measure`). Those of 0 tokens, which cannot be
        read, are spread like the others, so that no batch is empty.
      group_by: "length" or "modality_length".
      batch_size: global.
    """
    draw = np.random.Generator(np.random.PCG64([seed, epoch]))
    lost = sizes[:, 0] == 0
    if lost.any() and not lost.all():
        sizes = sizes.copy()
        sizes[lost] = sizes[draw.choice(np.flatnonzero(~lost), int(lost.sum()))]
    order = draw.permutation(len(sizes))
    begun = -epoch * len(sizes) % batch_size
    head, rest = order[:begun], order[begun:]
    kinds = [rest]
    if group_by == "modality_length":
        has_image = sizes[rest, 1] > 0
        kinds = [rest[has_image], rest[~has_image]]
    batches: list[np.ndarray] = []
    for kind in kinds:
        whole = kind[: len(kind) // batch_size * batch_size]
        for start in range(0, len(whole), MEGABATCH * batch_size):
            mega = whole[start : start + MEGABATCH * batch_size]
            mega = mega[np.argsort(-sizes[mega, 0], kind="stable")]
            batches += list(mega.reshape(-1, batch_size))
    tails = [kind[len(kind) // batch_size * batch_size :] for kind in kinds]
    batches = [batches[place] for place in draw.permutation(len(batches)).tolist()]
    if batches:
        longest = int(np.argmax([sizes[batch, 0].max() for batch in batches]))
        batches.insert(0, batches.pop(longest))
    return np.concatenate([head, *batches, *tails])
