"""Prompt templates of model families: roles, separators, and the text of images and videos."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from vlmprune_jax.io.families.tiles import ImageShape, VideoShape

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class VideoText:
    """Prompt text of a video: `start`, the texts of its temporal patches joined by `joint`, then `end`.

    A temporal patch holds one or more frames.
    """

    token: str
    """Context token, which is repeated once per position of a temporal patch."""

    patch: str
    """Text of a temporal patch, with one `token`; may have {number} (from 1), {seconds}, {clock} (minutes:seconds)."""

    start: str = ""
    """Text before the first patch; may have {count} (patches, in words) and {duration} (hours:minutes:seconds)."""

    joint: str = ""
    """Text between two temporal patches."""

    end: str = ""
    """Text after the last patch."""

    def write(self, video: VideoShape) -> str:
        """Return the prompt text of a video, with one image token and the time of each temporal patch."""
        patches = [
            self.patch.format(number=number, seconds=seconds, clock=f"{int(seconds // 60):02d}:{int(seconds % 60):02d}")
            for number, seconds in enumerate(video.times, start=1)
        ]
        start = self.start.format(count=in_words(len(patches)), duration=timedelta(seconds=int(video.duration)))
        return start + self.joint.join(patches) + self.end


def in_words(number: int) -> str:
    """Return a number from 0 to 999,999 in English words, as the package num2words writes them."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    most, rest = divmod(number, unit)
    joint = ", " if rest >= 100 else " and "
    return f"{in_words(most)} {name}" + (joint + in_words(rest) if rest else "")


@dataclass(frozen=True)
class Template:
    """Prompt format: `start`, the system prompt, then `role + gap + text + end` for each turn.

    Images are placeholders in the text of a turn, and are tokenised as the fields say.
    """

    name: str
    system: str
    system_end: str
    user: str
    user_end: str
    assistant: str
    assistant_end: str

    gap: str = ""
    """Text between a role and the text of its turn."""

    image_first: bool = False
    """True to move a turn's image placeholders in front of its stripped text, each followed by `behind_image`."""

    start: str = ""
    system_start: str = ""

    image_lead: bool = False
    """True to put a placeholder in front of the first turn if a record's only image has none there."""

    behind_image: str = "\n"
    """Text after each placeholder that `image_first` moves."""

    tight_image: bool = False
    """True to remove white space around images, and the gap before an image that begins a turn."""

    image_tokens: tuple[str, str, str] | None = None
    """(start, context, end) tokens of an image, the context token once per position; None: text is tokenised in pieces
    between images.
    """

    tile_start: str = ""
    """Text before a tile, with {row} and {column} from 1; tiles are then written separately."""

    overview: str = ""
    """Text before the overview; tiles and overview then stand between one start and one end token."""

    crops: str = ""
    """Text of an image with crops: {image} is the whole image, {crops} are the crops, separated by spaces."""

    strips: bool = False
    """True to remove white space around the text of every turn."""

    row_end: str = ""
    """Text after each row of tiles, and before the overview."""

    padding_mark: str | None = None
    """Token whose presence in a record makes the reference miscount the record's length; None: no such token."""

    by_turn: bool = False
    """True if labels are found turn by turn: empty turns keep their end, and an answer is trained from its gap to its
    end token, without the white space after it. Otherwise, end tokens in the whole text separate the labels.
    """

    special: tuple[str, ...] = ()
    """Texts that must each be a single token of the tokenizer."""

    video: VideoText | None = None
    """Prompt text of videos; None for templates without videos."""

    def image_text(self, image: ImageShape) -> str:
        """Return the prompt text of an image or video: a context token, or one per tile or temporal patch."""
        assert self.image_tokens is not None
        if isinstance(image, VideoShape):
            assert self.video is not None
            return self.video.write(image)
        whole, context = "".join(self.image_tokens), self.image_tokens[1]
        if image.slots == 1 or not (self.tile_start or self.crops):
            return whole
        if self.crops:
            return self.crops.format(image=whole, crops=" ".join([whole] * (image.slots - 1)))
        text = ""
        for row in range(1, image.rows + 1):
            starts = [self.tile_start.format(row=row, column=column) for column in range(1, image.columns + 1)]
            text += "".join(start + context for start in starts) + self.row_end
        if self.overview:
            last = self.overview + context if image.slots > image.rows * image.columns else ""
            return self.image_tokens[0] + text + last + self.image_tokens[2]
        return text + self.row_end + whole

    def context_tokens(self, image: ImageShape) -> int:
        """Return the number of context tokens in `image_text`."""
        if isinstance(image, VideoShape):
            return len(image.times)
        return image.slots if self.image_tokens is not None and (self.tile_start or self.crops) else 1


def role_marks(start: str, end: str, assistant: str = "assistant") -> dict[str, Any]:
    """Return the fields of a `Template` whose roles have the same text around their names; `start` contains {role}."""
    names = {"system_start": "system", "user": "user", "assistant": assistant}
    ends = dict.fromkeys(("system_end", "user_end", "assistant_end"), end)
    return {**{field: start.format(role=role) for field, role in names.items()}, **ends}


# LLaVA's template, which is Vicuna's and the default of families.
LLAVA_V1 = Template(
    name="llava_v1",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_end=" ",
    user="USER:",
    user_end=" ",
    assistant="ASSISTANT:",
    assistant_end="</s>",
    gap=" ",
    image_first=True,
)

# Images stay in place in a turn, since the parts of a chat are joined without white space.
QWEN3_VL = Template(
    name="qwen3_vl",
    system="",
    **role_marks("<|im_start|>{role}\n", "<|im_end|>\n"),
    tight_image=True,
    image_tokens=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    by_turn=True,
    special=("<|im_start|>", "<|im_end|>"),
    video=VideoText(
        "<|video_pad|>",
        "<{seconds:.1f} seconds><|vision_start|><|video_pad|><|vision_end|>",
        start="<|vision_start|>",
        end="<|vision_end|>",
    ),
)
QWEN2_5_VL = replace(
    QWEN3_VL,
    name="qwen2_5_vl",
    system="You are a helpful assistant.",
    video=VideoText("<|video_pad|>", "<|video_pad|>", start="<|vision_start|>", end="<|vision_end|>"),
)
