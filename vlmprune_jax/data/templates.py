"""The prompt formats of the families: one table, and which of them a model uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlmprune_jax.errors import UserError


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


_LLAVA_V1 = Template(
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
_PHI3_CHAT = Template(
    name="phi3-chat",
    system_start="<|system|>\n",
    system="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。",
    system_end="<|end|>",
    user="<|user|>\n",
    user_end="<|end|>",
    assistant="<|assistant|>\n",
    assistant_end="<|end|>",
    gap="",
    image_first=False,
    image_lead=True,
    image_tokens=("<img>", "<IMG_CONTEXT>", "</img>"),
    padding_mark="<|endoftext|>",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
_BUNNY = replace(_LLAVA_V1, name="bunny", assistant_end="<|endoftext|>")
# InternVL with Qwen2 or Llama, 1.5 and 2 | 2.5 and later (reference: InternVL conversation.py, dataset.py).
_HERMES_2 = replace(
    _PHI3_CHAT,
    name="Hermes-2",
    system_start="<|im_start|>system\n",
    system_end="<|im_end|>",
    user="<|im_start|>user\n",
    user_end="<|im_end|>",
    assistant="<|im_start|>assistant\n",
    assistant_end="<|im_end|>",
    special=("<|im_start|>", "<|im_end|>"),
)
_INTERNVL2_5 = replace(
    _HERMES_2,
    name="internvl2_5",
    system="你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
    system_end="<|im_end|>\n",
    user_end="<|im_end|>\n",
    assistant_end="<|im_end|>\n",
    padding_mark=None,
    by_turn=True,
)
TEMPLATES = {one.name: one for one in (_LLAVA_V1, _BUNNY, _PHI3_CHAT, _HERMES_2, _INTERNVL2_5)}
_BY_FAMILY = {"bunny": _BUNNY, "internvl": _PHI3_CHAT}
AUTO = "auto"


def template_of(family: str, config: Mapping[str, Any]) -> Template:
    """Return the template of a model's family, or the one that an InternVL's config.json names (`template`).

    Raises UserError for a name that is not known.
    """
    named = config.get("template") if family == "internvl" else None
    if named is None:
        return _BY_FAMILY.get(family, _LLAVA_V1)
    if named not in TEMPLATES:
        raise UserError(f"config.json: prompt template {named!r} is not supported (supported: {', '.join(TEMPLATES)})")
    return TEMPLATES[named]


def choose_template(name: str, family: str, tokenizer: Any, *, config: Mapping[str, Any], has_vision: bool) -> Template:
    """Return the template called `name`, or that of the model (`template_of` its `config`) where it is "auto".

    A LLaVA whose tokenizer ends texts with Bunny's mark (an exported Bunny) takes Bunny's. Raises UserError where the
    tokenizer lacks a token of the template.
    """
    if name == AUTO:
        is_bunny = family == "llava" and tokenizer.eos_token == _BUNNY.assistant_end
        template = _BUNNY if is_bunny else template_of(family, config)
    else:
        template = TEMPLATES[name]
    needed = (*template.special, *((template.image_tokens or ()) if has_vision else ()))
    known = tokenizer.get_vocab()
    missing = [token for token in needed if token not in known]
    if missing:
        raise UserError(
            f"template {template.name}: the tokenizer has no token {', '.join(missing)}; set data.template to one of "
            f"{', '.join(other for other in TEMPLATES if other != template.name)}, or use the model's own tokenizer"
        )
    return template
