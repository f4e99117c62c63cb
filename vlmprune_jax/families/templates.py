"""What a prompt format says; each is a fact of the family that was trained with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlmprune_jax.core.config import ImageShape


@dataclass(frozen=True)
class Template:
    """How turns become one string: `start`, the system text in its marks, then per turn `role + gap + text + end`.

    `image_first` moves the placeholders of a turn in front of its stripped text, `behind_image` after each;
    `image_lead` puts one in front of the first turn where a record's only image has none there; with `tight_image`
    there is no white space around images, and no gap before one that begins a turn. With `image_tokens` (start,
    context, end) an image is written out as these tokens, the context one once per position; without, a text is
    tokenised piece by piece between its images. With a `tile_start`, in which {row} and {column} count from 1, the
    tiles of an image are written one by one, `row_end` behind each row of them and before the overview. A record that
    holds `padding_mark` is one whose length the reference miscounts. With `by_turn` an empty turn keeps its end, and
    every answer is learnt, with the gap before it, up to its end mark, without the white space behind it; else labels
    follow the end marks in the whole text. `special`: what must be single tokens; `videos`: the token of a video's
    positions, which no text may hold.
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
    row_end: str = ""
    padding_mark: str | None = None
    by_turn: bool = False
    special: tuple[str, ...] = ()
    videos: str | None = None

    def image_text(self, image: ImageShape) -> str:
        """An image of a template with `image_tokens`, with one context token for all its tiles or for each."""
        assert self.image_tokens is not None
        whole, context = "".join(self.image_tokens), self.image_tokens[1]
        if not self.tile_start or image.slots == 1:
            return whole
        text = ""
        for row in range(1, image.rows + 1):
            starts = [self.tile_start.format(row=row, column=column) for column in range(1, image.columns + 1)]
            text += "".join(start + context for start in starts) + self.row_end
        return text + self.row_end + whole

    def marks(self, image: ImageShape) -> int:
        """Context tokens in `image_text` (1 where an image is not written out)."""
        return 1 if self.image_tokens is None or not self.tile_start else image.slots


# LLaVA's, which is Vicuna's; families that say nothing take it as well.
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

# Images stay where they are in a turn, as the pieces of a chat are joined without white space.
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
