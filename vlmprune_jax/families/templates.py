"""Prompt templates; each family refers to the one that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlmprune_jax.families.tiles import ImageShape


@dataclass(frozen=True)
class Template:
    """Prompt format: `start`, the system prompt, then `role + gap + text + end` for each turn.

    Placement of images: `image_first` moves a turn's placeholders in front of its stripped text, each followed by
    `behind_image`. `image_lead` puts a placeholder in front of the first turn if a record's only image has none there.
    `tight_image` removes white space around images, and the gap before an image that begins a turn. `strips` removes
    white space around the text of every turn.

    Text of images: with `image_tokens` (start, context, end), an image is written as these tokens, the context token
    once per position; otherwise the text is tokenised piece by piece between images. With `tile_start` ({row} and
    {column} count from 1), tiles are written separately, with `row_end` after each row and before the overview. With
    `crops` the whole image precedes its crops, which stand for {image} and, with spaces between them, {crops}.

    Labels: with `by_turn` an empty turn keeps its end, and every answer is trained from its gap to its end token,
    without the white space after it; otherwise labels are found by the end tokens in the whole text.

    Tokens: `special` must be single tokens; `videos` is the token of video positions, which texts must not contain;
    records that contain `padding_mark` have a length that the reference miscounts.
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
    crops: str = ""
    strips: bool = False
    row_end: str = ""
    padding_mark: str | None = None
    by_turn: bool = False
    special: tuple[str, ...] = ()
    videos: str | None = None

    def image_text(self, image: ImageShape) -> str:
        """Return the prompt text of an image: one context token, or one per tile if `tile_start` is set."""
        assert self.image_tokens is not None
        whole, context = "".join(self.image_tokens), self.image_tokens[1]
        if image.slots == 1 or not (self.tile_start or self.crops):
            return whole
        if self.crops:
            return self.crops.format(image=whole, crops=" ".join([whole] * (image.slots - 1)))
        text = ""
        for row in range(1, image.rows + 1):
            starts = [self.tile_start.format(row=row, column=column) for column in range(1, image.columns + 1)]
            text += "".join(start + context for start in starts) + self.row_end
        return text + self.row_end + whole

    def context_tokens(self, image: ImageShape) -> int:
        """Return the number of image context tokens in `image_text`."""
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
    videos="<|video_pad|>",
)
QWEN2_5_VL = replace(QWEN3_VL, name="qwen2_5_vl", system="You are a helpful assistant.")
