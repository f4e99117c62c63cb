"""What a prompt format says; each is a fact of the family that was trained with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """How turns become one string: `system_start + system + system_end`, then per turn `role + gap + text + end`.

    `image_first` moves the placeholders of a turn in front of its stripped text, one a line; `image_lead` puts one in
    front of the first turn where a record's only image has none there. With `image_tokens` (start, context, end) an
    image is written out as these tokens, the context one once per position; without, a text is tokenised piece by
    piece between its images. A record that holds `padding_mark` is one whose length the reference miscounts. With
    `by_turn` an empty turn keeps its end, and every answer is learnt up to its end mark, without the white space behind
    it; else labels follow the end marks in the whole text. `special`: what must be single tokens.
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
    system_start: str = ""
    image_lead: bool = False
    image_tokens: tuple[str, str, str] | None = None
    padding_mark: str | None = None
    by_turn: bool = False
    special: tuple[str, ...] = ()


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
