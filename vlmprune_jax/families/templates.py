"""Prompt templates; each family refers to the one that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

from vlmprune_jax.families.tiles import ImageShape, VideoShape

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class VideoText:
    """Text of a video in a prompt: `start`, its temporal patches joined by `joint`, `end`.

    `patch` is the text of a temporal patch (of a frame, if patches hold one) with one `token`, which stands for its
    positions. It may have {number}, counted from 1, {seconds}, and {clock}, minutes and seconds. `start` may have
    {count}, the number of temporal patches in words, and {duration} in hours, minutes and seconds.
    """

    token: str
    patch: str
    start: str = ""
    joint: str = ""
    end: str = ""

    def write(self, video: VideoShape) -> str:
        """Return the text of a video."""
        patches = [
            self.patch.format(number=number, seconds=seconds, clock=_clock(seconds))
            for number, seconds in enumerate(video.times, start=1)
        ]
        start = self.start.format(count=in_words(len(patches)), duration=_hours(video.duration))
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


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _hours(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


@dataclass(frozen=True)
class Template:
    """Prompt format: `start`, the system prompt, then `role + gap + text + end` for each turn.

    Placement of images: `image_first` moves a turn's placeholders in front of its stripped text, each followed by
    `behind_image`. `image_lead` puts a placeholder in front of the first turn if a record's only image has none there.
    `tight_image` removes white space around images, and the gap before an image that begins a turn. `strips` removes
    white space around the text of every turn.

    Text of images: with `image_tokens` (start, context, end), an image is written as these tokens, the context token
    once per position; otherwise the text is tokenised piece by piece between images. With `tile_start` ({row} and
    {column} count from 1), tiles are written separately, with `row_end` after each row and before the overview; with
    `overview`, the text before it, tiles and overview stand between one start and one end. With
    `crops` the whole image precedes its crops, which stand for {image} and, with spaces between them, {crops}.

    Labels: with `by_turn` an empty turn keeps its end, and every answer is trained from its gap to its end token,
    without the white space after it; otherwise labels are found by the end tokens in the whole text.

    Tokens: `special` must be single tokens; records that contain `padding_mark` have a length that the reference
    miscounts. `video`: text of videos, None for templates without.
    """

    name: str
    system: str
    system_end: str
    user: str
    user_end: str
    assistant: str
    assistant_end: str
    gap: str
    image_first: bool
    start: str = ""
    system_start: str = ""
    image_lead: bool = False
    behind_image: str = "\n"
    tight_image: bool = False
    image_tokens: tuple[str, str, str] | None = None
    tile_start: str = ""
    overview: str = ""
    crops: str = ""
    strips: bool = False
    row_end: str = ""
    padding_mark: str | None = None
    by_turn: bool = False
    special: tuple[str, ...] = ()
    video: VideoText | None = None

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
    system_start="<|im_start|>system\n",
    system="",
    system_end="<|im_end|>\n",
    user="<|im_start|>user\n",
    user_end="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    assistant_end="<|im_end|>\n",
    gap="",
    image_first=False,
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
