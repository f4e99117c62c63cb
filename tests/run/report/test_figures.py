"""Importance by token type, and what serves vision."""

import dataclasses
import re

from prune_cases import layer_scores

from vlmprune_jax.core.prune import Scores
from vlmprune_jax.run.report.build import build_report


def test_kinds_of_tokens_and_what_serves_vision(workdir):
    assert "by kind of token" not in build_report(workdir).read_text()
    path = workdir / "depth" / "scores.npz"
    of = {kind: layer_scores(v) for kind, v in (("image", [1, 1, 6, 1, 1.0]), ("prompt", [2, 2, 2, 2, 2.0]))}
    dataclasses.replace(Scores.load(path), by_token_type=of).save(path)
    page = build_report(workdir).read_text()
    assert page.count("<svg") == 8
    assert "Most important for images: layers 2 (0.75). In brackets" in page  # 0.6 of images, 0.2 of text
    path = workdir / "width" / "scores.npz"
    scores = Scores.load(path)
    weighted = {key: part * (1 + 9 * (key.layer == 3 and key.axis != "mlp")) for key, part in scores.values.items()}
    dataclasses.replace(scores, by_token_type={"image": weighted, "answer": scores.values}).save(path)
    told = re.search(
        r"width/scores.npz. Most important for images: layers none; heads (.*?)\. In", build_report(workdir).read_text()
    )
    assert [one.split()[0][0] for one in told.group(1).split(", ")] == ["3"] * 4
