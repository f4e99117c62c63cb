"""Choice of a prompt template: by name, or the one that makes the same prompt as the chat template of a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import MAX_JSON_BYTES, read_json, read_text
from vlmprune_jax.io.data.forms import IMAGE_TOKEN, VIDEO_TOKEN
from vlmprune_jax.io.data.prompts import render
from vlmprune_jax.io.data.tokenizer_files import try_script
from vlmprune_jax.io.families import Family, template_of, templates
from vlmprune_jax.io.families.templates import Template

AUTO = "auto"
QUESTION = "How many?"
_SYSTEM = "\0"  # placeholder for the system text
# Runs the folder's template in jinja's sandbox, in a process with limited time and memory, because it may loop.
_SECONDS, _BYTES, _WALL_SECONDS = 5, 2**30, 30
_RENDER = """
import re
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
text, names = values
limit()
def refuse(message):
    raise ValueError(message)
jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
jinja.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
jinja.globals.update(raise_exception=refuse, strftime_now=lambda form: "")
text = re.sub(r"{%-?\\s*(end)?generation\\s*-?%}", "", text)  # a tag of transformers
sys.stdout.buffer.write(jinja.from_string(text).render(**names)[:10000].encode())
"""


class _ChatTemplate(TypedDict):
    """Fields of chat_template.json, which transformers 4 wrote next to a processor's config."""

    chat_template: NotRequired[str]


def choose_template(
    name: str,
    family: Family,
    tokenizer: Any,
    *,
    config: Mapping[str, Any],
    has_vision: bool,
    chat: str | None = None,
) -> Template:
    """Return the prompt template called `name`; "auto" selects the template that matches the model's own chat template.

    This is the first known template that produces the prompt `chat` (see `chat_prompt`), or else the template of the
    model's family and `config` (`template_of`). Raises UserError if the tokenizer lacks a token of the template.
    """
    template = template_of(family, config, tokenizer.eos_token) if name == AUTO else templates()[name]
    known = [template, *templates().values()]
    if adds_begin(tokenizer):
        known = [
            replace(template, start="") if template.start == tokenizer.bos_token else template for template in known
        ]
    template = known[0]
    if name == AUTO and chat is not None:
        template = follow(chat, known, has_image=has_vision) or template
    image = re.findall(r"<[^<>]+>", "".join(template.image_tokens or ()) if has_vision else "")
    vocabulary = tokenizer.get_vocab()
    if template.video is not None and template.video.token not in vocabulary:
        template = replace(template, video=None)
    missing = [token for token in (*template.special, *image) if token not in vocabulary]
    if missing:
        raise UserError(
            f"template {template.name}: the tokenizer lacks {', '.join(missing)}: set data.template to "
            f"{'' if name == AUTO else 'auto or '}one of "
            f"{', '.join(other for other in templates() if other != template.name)}, or use the model's own tokenizer"
        )
    return template


def follow_video(template: Template, folder: Path, tokenizer: Any) -> Template:
    """Return the template with the white space around videos that the folder's own chat template writes.

    This white space differs between folders of one family (Gemma 4). A template without such white space is returned
    unchanged.
    """
    video = template.video
    if video is None or not video.start or (video.start + video.end).strip():
        return template
    before, token, after = (chat_prompt(folder, tokenizer, has_image=True, part="video") or "").partition(video.token)
    question = [("human", f"{VIDEO_TOKEN}{QUESTION}")]
    prompt = render(question, template, has_image=False, has_video=True, generation=True).text
    start, _, end = prompt.partition(VIDEO_TOKEN)
    blanks = before.removeprefix(start), after.removesuffix(end)
    if not token or "".join(blanks).strip() or before != start + blanks[0] or after != blanks[1] + end:
        return template
    return replace(template, video=replace(video, start=blanks[0], end=blanks[1]))


def adds_begin(tokenizer: Any) -> bool:
    """Return True if the tokenizer puts its begin-of-text token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def chat_prompt(folder: Path, tokenizer: Any, *, has_image: bool, part: str = "image") -> str | None:
    """Format a test question with the folder's own chat template, after an image (or video) if the model takes images.

    The result is None if there is no chat template, or it rejects such a chat or needs too much time or memory.
    """
    text = _chat_template(folder, tokenizer)
    if text is None:
        return None
    content: Any = [{"type": part}, {"type": "text", "text": QUESTION}] if has_image else QUESTION
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    values = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True, **tokens}
    output = try_script(_RENDER, [text, values], seconds=_SECONDS, memory=_BYTES, wall=_WALL_SECONDS)
    begin = tokenizer.bos_token if adds_begin(tokenizer) else ""
    return None if output is None else output.decode().removeprefix(begin)


def _chat_template(folder: Path, tokenizer: Any) -> str | None:
    if os.path.lexists(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja", MAX_JSON_BYTES)
    if os.path.lexists(folder / "chat_template.json"):
        return read_json(folder / "chat_template.json", _ChatTemplate).get("chat_template")
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def prompt_of(template: Template, *, has_image: bool) -> str:
    """Format a test question with a prompt template of vlmprune; with `has_image` an image precedes it."""
    text = f"{IMAGE_TOKEN}\n{QUESTION}" if has_image else QUESTION
    return render([("human", text)], template, has_image=has_image, generation=True).text


def follow(prompt: str, known: Iterable[Template], *, has_image: bool) -> Template | None:
    """Return the first known template that reproduces `prompt`, with the prompt's system text; None if none does."""
    for template in known:
        written = with_marks(prompt, template)
        for system in (template.system, ""):
            candidate = replace(template, system=system)
            if prompt_of(candidate, has_image=has_image) == written:
                return candidate
        before, _, after = prompt_of(replace(template, system=_SYSTEM), has_image=has_image).partition(_SYSTEM)
        if len(written) > len(before + after) and written.startswith(before) and written.endswith(after):
            return replace(template, system=written[len(before) : len(written) - len(after)])
    return None


def with_marks(prompt: str, template: Template) -> str:
    """Return a chat template's prompt whose image tokens are replaced by `<image>` placeholders.

    A chat template writes all tokens of an image, or only the context or start token; the processor adds the others.
    """
    if template.image_tokens is None:
        return prompt
    start, context, end = template.image_tokens
    lines = start[: -len(start.lstrip())], end[len(end.rstrip()) :]
    forms = (start + context + end, context.join(lines), context, start.strip())
    return prompt.replace(next((form for form in forms if form in prompt), context), IMAGE_TOKEN)


def other_prompt(template: Template, chat: str | None, *, has_image: bool, name: str = AUTO) -> Iterator[str]:
    """Yield a warning if this run's prompts differ from prompts made by the folder's own chat template.

    `name`: value of the setting `data.template`.
    """
    mine = prompt_of(template, has_image=has_image)
    if chat is not None and with_marks(chat, template) != mine:
        yield f"prompts are {mine!r} (template {template.name}), but those of the folder's chat template {chat!r}" + (
            "" if name == AUTO else f'; a recipe or config sets data.template="{name}": set it to "auto" for the latter'
        )
