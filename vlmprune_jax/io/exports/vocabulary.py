"""Tokenizer and config files of an export: trimmed vocabularies, added tokens, limits of images."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import MAX_JSON_BYTES, copy_file, copy_folder, read_bytes, read_json, read_text, reading
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.plans.kept import KeptVocabulary
from vlmprune_jax.io.checkpoints.read import read_fields
from vlmprune_jax.io.data.images import limited_files
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.tokenizer_files import ADDED_TOKENS, SLOW, TOKENIZER, TOKENIZER_CONFIG, TokenizerFile
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.table import JsonDict

CONFIGS = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.npz", "*.index.json")
# Fields with a token id, a list of ids, or lists of lists of ids.
_ID = re.compile(r".*token_ids?|.*token_index|(begin_)?suppress_tokens|bad_words_ids|force_words_ids")
_MAY_DROP = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")  # of tokens that no longer exist
_ROWS = ("vocab_size", "vocab_size_per_layer_input")


@contextlib.contextmanager
def export_files(
    source: Path, cfg: ModelConfig, vocabulary: KeptVocabulary | None = None, most: int | None = None
) -> Iterator[Path]:
    """Context that yields a folder with the tokenizer, processor and configs of an export.

    Args:
      source: the folder from which the model was loaded; the result if nothing changes, otherwise a copy without
        weights is changed.
      cfg: config of the model to write.
      vocabulary: the only tokens to keep (None = all). Files that have just these tokens already are not changed.
      most: maximum number of tokens per image (None = as in `source`).

    Raises UserError if the tokenizer cannot be trimmed (see `trim_files`), or the images cannot be limited.
    """
    with tempfile.TemporaryDirectory(prefix="vlmprune-") as copy:
        folder, files = Path(copy), source
        section = family_of(cfg).text_config(read_fields(source / "config.json"))
        if vocabulary is not None and section.get("vocab_size", vocabulary.rows_before) == vocabulary.rows_before:
            trim_files(source, folder, vocabulary, cfg)
            files = folder
        if most is not None:
            with error_context(f"export.max_image_tokens={most}"):
                if cfg.vision is None:
                    raise UserError("this model takes no images: unset the limit")
                changed = limited_files(files, most, cfg.tokens_per_image)
            if files is source:
                copy_files(source, folder)
            for name, content in changed.items():
                _write(folder / name, content)
            files = folder
        yield files


def trim_files(source: Path, folder: Path, vocabulary: KeptVocabulary, cfg: ModelConfig) -> None:
    """Copy all files of `source` except weights to `folder`, with only the kept tokens and their new ids.

    Raises UserError if the tokenizer differs from the plan's or cannot be trimmed, or a file has a removed token's id.
    """
    content = read_tokenizer(source)
    if content is None:
        raise UserError(f"{source}: has no tokenizer, so its vocabulary cannot be trimmed: add tokenizer.json")
    if vocabulary_digest(content) != vocabulary.tokenizer:
        raise UserError(f"{source}: its tokenizer differs from the one that the plan was made with: plan again")
    copy_files(source, folder)
    with reading(f"{source}: its tokenizer"):
        _trim_tokenizer_files(source, folder, content, vocabulary)
    for name in CONFIGS:
        if os.path.lexists(source / name):
            config = trim_config(read_json(source / name), vocabulary, str(source / name))
            _write(folder / name, _explicit(config, cfg) if name == "config.json" else config)


def copy_files(source: Path, folder: Path, patterns: Sequence[str] = ("*",), but: Sequence[str] = _WEIGHTS) -> None:
    """Copy the files of a model folder that match one of `patterns` and none of `but`, and its chat templates."""
    for name in sorted(os.listdir(source)):  # a glob would skip broken links
        wanted, unwanted = (any(fnmatch.fnmatchcase(name, x) for x in names) for names in (patterns, but))
        if wanted and not unwanted and not os.path.isdir(source / name):
            copy_file(source / name, folder / name, source)
    templates = source / "additional_chat_templates"
    if os.path.lexists(templates):
        copy_folder(templates, folder / templates.name, source)


def _trim_tokenizer_files(source: Path, folder: Path, content: JsonDict, vocabulary: KeptVocabulary) -> None:
    old, kept = token_ids(content), set(vocabulary.kept)
    texts = {text for text, i in old.items() if i in kept}
    fast = os.path.lexists(source / TOKENIZER)
    if fast:
        _write(folder / TOKENIZER, trim_tokenizer(content, vocabulary.kept), indent=None)
    elif os.path.lexists(source / "tokenizer.tiktoken"):
        raise UserError(f"{source}: tokenizer.tiktoken cannot be trimmed: convert the tokenizer to tokenizer.json")
    if os.path.lexists(source / "tokenizer.model"):
        pieces = read_bytes(source / "tokenizer.model", MAX_JSON_BYTES)
        trimmed = trim_pieces(pieces, kept, vocabulary.new_ids, str(source / "tokenizer.model"))
        (folder / "tokenizer.model").write_bytes(trimmed)
    for path in (source / "vocab.json", source / "merges.txt"):
        if fast:
            (folder / path.name).unlink(missing_ok=True)
        elif os.path.lexists(path) and path.suffix == ".json":
            ids = {text: vocabulary.new_ids[i] for text, i in read_json(path).items() if i in kept}
            (folder / path.name).write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
        elif os.path.lexists(path):
            lines = read_text(path, MAX_JSON_BYTES).splitlines()
            lines = [x for x in lines if x.startswith("#version") or all(part in texts for part in _parts(x))]
            (folder / path.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if os.path.lexists(source / ADDED_TOKENS):
        added = {text: vocabulary.new_ids[i] for text, i in read_json(source / ADDED_TOKENS).items() if i in kept}
        _write(folder / ADDED_TOKENS, added)
    dropped = set(old) - texts
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        if os.path.lexists(source / name):
            _write(folder / name, _without(read_json(source / name), dropped, vocabulary.new_ids))


def trim_pieces(content: bytes, kept: Collection[int], new_ids: Mapping[int, int], location: str) -> bytes:
    """Return the content of SentencePiece's `tokenizer.model` with only the pieces whose old ids are `kept`.

    A removed special token gets the id -1 ("none").
    """
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise UserError(f"{location}: is no SentencePiece model, or is damaged: restore it from its source") from None
    pieces = [piece for number, piece in enumerate(model.pieces) if number in kept]
    if not pieces:
        raise UserError(f"{location}: contains none of the tokens that the plan keeps: restore it from its source")
    del model.pieces[:]
    model.pieces.extend(pieces)
    if model.HasField("trainer_spec"):
        model.trainer_spec.vocab_size = len(pieces)
        for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
            setattr(model.trainer_spec, name, new_ids.get(getattr(model.trainer_spec, name), -1))
    trimmed: bytes = model.SerializeToString()
    return trimmed


def _without(config: JsonDict, dropped: set[str], new_ids: Mapping[int, int]) -> JsonDict:
    """Return tokenizer_config.json with the kept tokens' new ids, and without removed special tokens."""
    trimmed = dict(config)
    for name, value in config.items():
        if name.endswith("special_tokens") and isinstance(value, list):
            texts = [token.get("content") if isinstance(token, dict) else token for token in value]
            trimmed[name] = [token for token, text in zip(value, texts, strict=True) if text not in dropped]
    listed = trimmed.get("added_tokens_decoder")
    if isinstance(listed, dict):
        trimmed["added_tokens_decoder"] = {
            str(new_ids[int(i)]): token for i, token in listed.items() if int(i) in new_ids
        }
    return trimmed


def map_ids(value: Any, change: Callable[[str, int], int | None], name: str = "") -> Any:
    """Return a config file's JSON value, every token id and size of the vocabulary replaced by `change(field, number)`.

    Ids that become None are left out of lists that may name removed tokens; so are sequences of bad words with such an
    id.
    """
    if isinstance(value, dict):
        return {key: map_ids(part, change, key) for key, part in value.items()}
    if isinstance(value, list):
        items = [map_ids(part, change, name) for part in value]
        if name == "bad_words_ids" and None in items and not any(isinstance(part, list) for part in value):
            return None
        return [part for part in items if part is not None] if name in _MAY_DROP else items
    is_changed = type(value) is int and (name in _ROWS or _ID.fullmatch(name))
    return change(name, value) if is_changed else value


def trim_config(config: JsonDict, vocabulary: KeptVocabulary, location: str) -> JsonDict:
    """Return a config file's content with the new token ids and vocabulary size.

    Raises UserError if the file contains the id of a removed token.
    """

    def change(name: str, old: int) -> int | None:
        if name in _ROWS:
            return len(vocabulary.kept) if old == vocabulary.rows_before else old
        new = vocabulary.new_ids.get(old)
        if new is None and 0 <= old < vocabulary.rows_before and name not in _MAY_DROP:
            raise UserError(
                f"{location}: {name} is token {old}, which the plan removes: make a plan that keeps this token"
            )
        return new if new is not None or name in _MAY_DROP else old

    changed: JsonDict = map_ids(config, change)
    return changed


def ids_in(config: JsonDict) -> dict[int, str]:
    """Return {token id: field} of the ids in a config file, except ids that may be removed."""
    fields: dict[int, str] = {}

    def note(name: str, i: int) -> int:
        if name not in (*_MAY_DROP, *_ROWS):
            fields.setdefault(i, name)
        return i

    map_ids(config, note)
    return fields


def _explicit(config: JsonDict, cfg: ModelConfig) -> JsonDict:
    """Add the vocabulary size and token ids that config.json omits because they are class defaults."""
    changed, section = dict(config), family_of(cfg).text_section
    for name in ("image_token_id", "video_token_id"):
        value = getattr(cfg, name)
        if value is not None and value >= 0 and not changed.keys() & {name, name.replace("_id", "_index")}:
            changed[name] = value
    if section is None:
        changed.setdefault("vocab_size", cfg.text.vocab_size)
    elif isinstance(changed.get(section), dict):
        names = _ROWS if cfg.text.block.layer_inputs else _ROWS[:1]
        changed[section] = {**dict.fromkeys(names, cfg.text.vocab_size), **changed[section]}
    return changed


def _write(path: Path, value: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def trim_tokenizer(content: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the content of tokenizer.json with only the kept tokens, renumbered in their old order."""
    new = {old: i for i, old in enumerate(kept)}
    model = dict(content["model"])
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [vocab[old] for old in kept if old < len(vocab)]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {text: new[old] for text, old in sorted(vocab.items(), key=lambda item: item[1]) if old in new}
    if model.get("merges"):
        there = model["vocab"]
        model["merges"] = [merge for merge in model["merges"] if all(part in there for part in _parts(merge))]
    added = [{**token, "id": new[token["id"]]} for token in content.get("added_tokens") or () if token["id"] in new]
    trimmed = {
        **content,
        "model": model,
        "added_tokens": added,
        "post_processor": _renumbered(content.get("post_processor"), new),
    }
    if isinstance(content.get("padding"), dict) and content["padding"].get("pad_id") in new:
        trimmed["padding"] = {**content["padding"], "pad_id": new[content["padding"]["pad_id"]]}
    return trimmed


def _parts(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
    return left, right, left + right


def _renumbered(step: Any, new: Mapping[int, int]) -> Any:
    """Return tokenizer.json's post_processor with the kept tokens' new ids."""
    if isinstance(step, list):
        return [_renumbered(part, new) for part in step]
    if not isinstance(step, dict):
        return step
    changed = {name: _renumbered(part, new) for name, part in step.items()}
    if isinstance(step.get("special_tokens"), dict):
        changed["special_tokens"] = {
            name: {**token, "ids": [new[i] for i in token["ids"]]}
            for name, token in step["special_tokens"].items()
            if all(i in new for i in token["ids"])
        }
    for name in ("cls", "sep"):
        if isinstance(step.get(name), list) and len(step[name]) == 2:
            changed[name] = [step[name][0], new[step[name][1]]]
    return changed


# Settings of classes that rebuild tokenizer.json on loading; the file contains all rules.
_REBUILD = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs", "auto_map", "from_slow",
            "use_default_system_prompt", "spaces_between_special_tokens", "special_tokens_map_file", "name_or_path",
            "chat_template", "tokenizer_file", "added_tokens_decoder")  # fmt: skip
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def read_tokenizer(folder: Path) -> JsonDict | None:
    """Return the content of tokenizer.json, converted from older files if needed; None without a tokenizer."""
    if os.path.lexists(folder / TOKENIZER):
        return read_json(folder / TOKENIZER, TokenizerFile)
    if not any(os.path.lexists(folder / name) for name in SLOW):
        return None
    content: JsonDict = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
    return content


def vocabulary_digest(tokenizer: JsonDict) -> str:
    """Return a digest (16 hex digits) of the ids and texts of all tokens."""
    listed = sorted((i, text) for text, i in token_ids(tokenizer).items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def add_token(tokenizer: JsonDict, token: str) -> tuple[JsonDict, int]:
    """Add a special token to a tokenizer unless it exists; return the tokenizer and the token's id."""
    ids = token_ids(tokenizer)
    if token in ids:
        return tokenizer, ids[token]
    number = max(ids.values()) + 1
    added = [*(tokenizer.get("added_tokens") or ()), {"id": number, "content": token, **_FLAGS, "special": True}]
    return {**tokenizer, "added_tokens": added}, number


def token_ids(tokenizer: JsonDict) -> dict[str, int]:
    """Return {token: id} of a tokenizer, including added tokens."""
    vocab = tokenizer["model"]["vocab"]
    # Unigram lists [piece, score] pairs, in the order of their ids
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return ids | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}


def prefixes_only_the_start(tokenizer: JsonDict) -> bool:
    """Return True if a tokenizer puts its space symbol only before the whole text, not after special tokens."""
    step = tokenizer.get("pre_tokenizer") or {}
    steps = [inner for inner in step.get("pretokenizers", [step]) if isinstance(inner, dict)]
    return any(inner.get("type") == "Metaspace" and inner.get("prepend_scheme") == "first" for inner in steps)


def write_tokenizer(folder: Path, source: Path, tokenizer: JsonDict, named: dict[str, str], processor: str) -> None:
    """Write tokenizer.json and tokenizer_config.json; `named` maps the processor's names to special tokens."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        if os.path.lexists(source / name):
            config |= read_json(source / name)
    config = {name: value for name, value in config.items() if name not in _REBUILD}
    known = config.get("extra_special_tokens")
    config |= {
        # LlamaTokenizer of transformers 5 would replace the file's rules by its own, which differ from Phi-3's
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor,
        "extra_special_tokens": (known if isinstance(known, dict) else {}) | named,
        "model_input_names": ["input_ids", "attention_mask"],  # no token types, which the plain class would add
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    for name, value in ((TOKENIZER, tokenizer), (TOKENIZER_CONFIG, config)):
        _write(folder / name, value)
