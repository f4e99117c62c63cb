"""python tools/moving_shapes.py OUT: write the data set "moving shapes", short clips with questions about time.

Clips have 16 frames of 64 x 64 pixels at 8 fps, encoded as H.264. All changes happen between pairs of frames, so that 8
sampled frames show all of them. Every clip also exists in reverse, where the answers about time are the opposite: a
model that ignores the order of frames is right for one clip of a pair. OUT gets:
  train.json                         a record per clip, with its four questions as turns
  test.json                          a record per question, with the field "question_type"
  test_shuffled.json                 the test questions about clips whose pairs of frames are in random order
  test_middle.json                   the test questions about clips that repeat the middle frame
  clips/                             MP4 files
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.main import main

TAKES_ARGUMENTS = True
SIDE, STEPS, FPS, RADIUS = 64, 8, 8, 12  # pixels, pairs of frames, frames per second, pixels
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "triangle")
BACKGROUND = (245, 245, 245)
# Answers that are exchanged if a clip is reversed; all others stay.
OPPOSITE = {
    "left": "right", "right": "left", "up": "down", "down": "up", "yes": "no", "no": "yes",
    "faster": "slower", "slower": "faster", "first": "second", "second": "first",
}  # fmt: skip
TEMPORAL = ("direction", "first", "last", "before", "blinks", "colour_after", "colour_before", "speed", "half")


@dataclass(frozen=True)
class Shape:
    """Shape of a clip: `colours`, `places` (x, y) and `visible` have one entry per step."""

    name: str
    colours: tuple[str, ...]
    places: tuple[tuple[float, float], ...]
    visible: tuple[bool, ...]


@dataclass(frozen=True)
class Question:
    """Question about a clip, its answer, and its answer about the reversed clip."""

    question_type: str
    text: str
    answer: str
    reversed_answer: str


Scene = tuple[list[Shape], list[Question]]


def clips(number: int, seed: str) -> Iterator[Scene]:
    """Yield `number` clips of the four kinds of scenes in turn."""
    scenes: Sequence[Callable[[random.Random], Scene]] = (_motion, _order, _blinks, _colours)
    for place in range(number):
        yield scenes[place % len(scenes)](random.Random(f"{seed} {place}"))


def _draw_shapes(draw: random.Random, count: int) -> tuple[list[str], list[str]]:
    return draw.sample(SHAPES, count), draw.sample(sorted(COLOURS), count)


def _still(name: str, colour: str, place: tuple[float, float], visible: Sequence[bool] = (True,) * STEPS) -> Shape:
    return Shape(name, (colour,) * STEPS, (place,) * STEPS, tuple(visible))


def _mover(draw: random.Random, name: str, colour: str, power: float) -> tuple[Shape, str, tuple[float, float]]:
    """Return a shape that crosses one half of the picture, its direction, and a place in the other half.

    The travelled share at time t in 0..1 is t^power: above 1 the shape speeds up, below 1 it slows down.
    """
    direction, lane = draw.choice(("left", "right", "up", "down")), draw.choice((16.0, 48.0))
    travelled = [(step / (STEPS - 1)) ** power * (SIDE - 24) + 12 for step in range(STEPS)]
    along = [SIDE - place for place in travelled] if direction in ("left", "up") else travelled
    level = direction in ("left", "right")
    places = tuple((place, lane) if level else (lane, place) for place in along)
    other = (draw.uniform(14, 50), SIDE - lane)
    return Shape(name, (colour,) * STEPS, places, (True,) * STEPS), direction, other if level else other[::-1]


def _direction(name: str, colour: str, direction: str) -> Question:
    return _question("direction", f"Which way does the {colour} {name} move?", direction)


def _static(name: str, colour: str) -> Question:
    return _question("static", f"Which colour is the {name}?", colour)


def _question(question_type: str, text: str, answer: str, reversed_answer: str = "") -> Question:
    opposite = OPPOSITE.get(answer, answer) if question_type in TEMPORAL else answer
    return Question(question_type, text, answer, reversed_answer or opposite)


def _motion(draw: random.Random) -> Scene:
    """Return a clip in which a shape moves and changes its speed, beside another shape."""
    (mover, other), (colour, second) = _draw_shapes(draw, 2)
    speed = draw.choice(("faster", "slower"))
    shape, direction, place = _mover(draw, mover, colour, 2.0 if speed == "faster" else 0.5)
    questions = [_direction(mover, colour, direction), _question("speed", "Does it speed up or slow down?", speed)]
    questions += [_static(mover, colour), _static(other, second)]
    return [shape, _still(other, second, place)], questions


def _order(draw: random.Random) -> Scene:
    """Return a clip in which three shapes appear one after the other."""
    names, colours = _draw_shapes(draw, 3)
    cuts = [0, *draw.choice(((2, 4), (2, 5), (3, 5), (3, 6))), STEPS]
    places = draw.sample([(x, y) for x in (16.0, 48.0) for y in (16.0, 48.0)], 3)
    shapes = [
        _still(name, colour, place, [start <= step < end for step in range(STEPS)])
        for name, colour, place, start, end in zip(names, colours, places, cuts, cuts[1:], strict=False)
    ]
    a, b = draw.sample(range(3), 2)
    questions = [
        _question("first", "Which shape appears first?", names[0], names[2]),
        _question("last", "Which shape appears last?", names[2], names[0]),
        _question("before", f"Does the {names[a]} appear before the {names[b]}?", "yes" if a < b else "no"),
    ]
    static = draw.randrange(3)
    return shapes, [*questions, _static(names[static], colours[static])]


def _blinks(draw: random.Random) -> Scene:
    """Return a clip in which one shape blinks, another appears in one half, and a third does nothing."""
    names, colours = _draw_shapes(draw, 3)
    count, half = draw.randint(1, 4), draw.choice(("first", "second"))
    apart = [steps for steps in _subsets(count) if all(b - a > 1 for a, b in pairwise(steps))]
    off = draw.choice(apart)
    start = draw.randint(0, 1) + (5 if half == "second" else 0)  # not in the middle, which test_middle.json repeats
    places = draw.sample([(x, y) for x in (16.0, 48.0) for y in (16.0, 48.0)], 3)
    shapes = [
        _still(names[0], colours[0], places[0], [step not in off for step in range(STEPS)]),
        _still(names[1], colours[1], places[1], [start <= step < start + 2 for step in range(STEPS)]),
        _still(names[2], colours[2], places[2]),
    ]
    questions = [
        _question("blinks", f"How often does the {names[0]} blink?", str(count)),
        _question("half", f"In which half does the {names[1]} appear?", half),
    ]
    return shapes, [*questions, _static(names[2], colours[2]), _static(names[0], colours[0])]


def _subsets(count: int) -> list[tuple[int, ...]]:
    numbers = [tuple(step for step in range(STEPS) if bits >> step & 1) for bits in range(2**STEPS)]
    return [steps for steps in numbers if len(steps) == count]


def _colours(draw: random.Random) -> Scene:
    """Return a clip in which one shape changes its colour while another moves."""
    (mover, other), (colour, before) = _draw_shapes(draw, 2)
    after = draw.choice([name for name in sorted(COLOURS) if name not in (colour, before)])
    shape, direction, place = _mover(draw, mover, colour, 1.0)
    change = draw.randint(3, 5)
    changing = Shape(other, (before,) * change + (after,) * (STEPS - change), (place,) * STEPS, (True,) * STEPS)
    questions = [
        _question("colour_after", f"Which colour does the {other} turn into?", after, before),
        _question("colour_before", f"Which colour did the {other} have at first?", before, after),
    ]
    return [shape, changing], [*questions, _direction(mover, colour, direction), _static(mover, colour)]


def draw_steps(shapes: Sequence[Shape]) -> np.ndarray:
    """Return a clip's pictures uint8[steps, 64, 64, 3], drawn at four times the size for smooth edges."""
    pictures = []
    for step in range(STEPS):
        picture = Image.new("RGB", (4 * SIDE, 4 * SIDE), BACKGROUND)
        pen = ImageDraw.Draw(picture)
        for shape in shapes:
            if shape.visible[step]:
                _draw(pen, shape.name, shape.places[step], COLOURS[shape.colours[step]])
        pictures.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX)))
    return np.stack(pictures)


def _draw(pen: ImageDraw.ImageDraw, name: str, place: tuple[float, float], colour: tuple[int, int, int]) -> None:
    (x, y), radius = (4 * place[0], 4 * place[1]), 4 * RADIUS
    corners = (x - radius, y - radius, x + radius, y + radius)
    if name == "circle":
        pen.ellipse(corners, colour)
    elif name == "square":
        pen.rectangle(corners, colour)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], colour)


def write_clip(path: Path, steps: np.ndarray) -> None:
    """Encode a clip, each of its steps as two frames, as H.264 in an MP4 file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.thread_count = 1  # the same file on every machine
        for picture in np.repeat(steps, 2, axis=0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def write_set(out: Path, name: str, number: int, seed: int, controls: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Write `number` clips and their reversed copies; return {file name: records, one per question}."""
    records: dict[str, list[Any]] = {key: [] for key in (name, *(f"{name}_{control}" for control in controls))}
    for place, (shapes, questions) in enumerate(clips(number, f"{seed} {name}")):
        for direction, reverse in (("f", False), ("r", True)):
            steps = draw_steps(shapes)[:: -1 if reverse else 1]
            shuffled = np.random.default_rng([seed, place, reverse]).permutation(STEPS)
            versions = {"": steps, "_shuffled": steps[shuffled], "_middle": steps[[STEPS // 2] * STEPS]}
            for suffix in ("", *(f"_{control}" for control in controls)):
                clip = f"{name}-{place:05}{direction}{suffix}"
                write_clip(out / "clips" / f"{clip}.mp4", versions[suffix])
                records[name + suffix] += [
                    {
                        "id": f"{clip}-{number}",
                        "video": f"clips/{clip}.mp4",
                        "question_type": question.question_type,
                        "conversations": [
                            {"from": "human", "value": f"<video>\n{question.text}"},
                            {"from": "gpt", "value": question.reversed_answer if reverse else question.answer},
                        ],
                    }
                    for number, question in enumerate(questions)
                ]
    return records


def by_clip(records: Sequence[Any], seed: int) -> list[Any]:
    """Return one record per clip, whose turns are its questions in random order."""
    draw, clips = random.Random(seed), []
    for _, group in itertools.groupby(records, lambda record: record["video"]):
        questions = [*group]
        draw.shuffle(questions)
        turns = [dict(turn) for question in questions for turn in question["conversations"]]
        for turn in turns[2::2]:
            turn["value"] = turn["value"].removeprefix("<video>\n")
        clips.append({"id": questions[0]["video"], "video": questions[0]["video"], "conversations": turns})
    return clips


FLAGS = {
    "train": (1000, "number of training clips, without the reversed ones"),
    "test": (200, "number of test clips, without the reversed ones"),
    "seed": (0, "random seed"),
}


def run(flags: Any) -> None:
    """Write the data set into a new folder."""
    if len(flags.args) != 1:
        raise UserError("moving_shapes.py takes one folder: python tools/moving_shapes.py runs/moving-shapes")
    out = Path(flags.args[0])
    if out.exists():
        raise UserError(f"{out}: exists already: remove it, or choose another folder")
    (out / "clips").mkdir(parents=True)
    written = {"train": by_clip(write_set(out, "train", flags.train, flags.seed)["train"], flags.seed)}
    written |= write_set(out, "test", flags.test, flags.seed, ("shuffled", "middle"))
    for name, records in written.items():
        (out / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        make_reporter(True).say(f"{out / name}.json: {len(records):,} records")


if __name__ == "__main__":
    sys.exit(main(script=sys.modules[__name__]))
