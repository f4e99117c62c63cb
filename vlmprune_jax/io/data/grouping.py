"""Order of training records that gives batches of similar length, and optionally of one modality."""

from __future__ import annotations

import numpy as np

MEGABATCH = 50  # batches sorted together, like `mega_batch_mult` of transformers' `group_by_length`


def grouped_order(sizes: np.ndarray, *, group_by: str, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return one epoch's record indices, shuffled and grouped by length or modality, int64[records].

    Records are permuted (with "modality_length" separately for each modality, as in LLaVA) and divided into
    megabatches. Each megabatch is sorted by length and divided into batches; the batches of all megabatches are
    permuted. The batch with the longest row comes first, so that a lack of memory shows at once, and records that do
    not fill a batch come last. In LLaVA, a megabatch is a single batch, which separates modalities but does not save
    padding.

    Batches continue across epochs: an epoch begins with the records that complete the previous epoch's last batch.

    Args:
      sizes: int[records, ...], tokens and image slots first (`measure.measure`). Unreadable records (0 tokens) are
        spread like the others, so that no batch is empty.
      group_by: "length" or "modality_length".
      batch_size: rows of a global batch.
    """
    draw = np.random.Generator(np.random.PCG64([seed, epoch]))
    unreadable = sizes[:, 0] == 0
    if unreadable.any() and not unreadable.all():
        sizes = sizes.copy()
        sizes[unreadable] = sizes[draw.choice(np.flatnonzero(~unreadable), int(unreadable.sum()))]
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
