"""python tools/guessing.py [QUESTIONS]: accuracy on easy-VQA that needs no image.

Guesses the most frequent training answer, to questions of the same kind (yes or no, shape, colour) or to the same
question, and prints the share of right guesses on the first QUESTIONS test questions (default: all).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmprune_jax.run.demo.easyvqa import write_dataset

Pair = tuple[str, str]  # question, answer


def pair(record: dict[str, Any]) -> Pair:
    """Return the question and the answer of a record."""
    asked, answered = (turn["value"] for turn in record["conversations"])
    return asked.removeprefix("<image>\n"), answered


def kind(question: str) -> str:
    """Return the kind of a question: about a colour, a shape, or to be answered by yes or no."""
    if not question.startswith("what"):
        return "yes or no"
    return "colour" if "color" in question else "shape"


def guessed(train: Sequence[Pair], test: Sequence[Pair], group: Callable[[str], str]) -> float:
    """Return the share (%) of test questions that the most frequent training answer to their group is right for."""
    answers = defaultdict[str, Counter[str]](Counter)
    for question, answer in train:
        answers[group(question)][answer] += 1
    best = {name: counts.most_common(1)[0][0] for name, counts in answers.items()}
    return 100 * sum(best.get(group(question)) == answer for question, answer in test) / len(test)


def main() -> None:
    """Print the accuracy of both ways to guess."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_dataset(Path(folder) / "easyvqa")
        train, test = ([*map(pair, json.loads(paths[split].read_text()))] for split in ("train", "test"))
    test = test[: int(sys.argv[1])] if len(sys.argv) > 1 else test
    print(f"{len(test)} questions")
    for title, group in (("kind of question", kind), ("question", str)):
        print(f"most frequent answer to the same {title}: {guessed(train, test, group):.1f} %")


if __name__ == "__main__":
    main()
