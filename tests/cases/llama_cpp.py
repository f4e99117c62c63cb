"""llama.cpp itself, of the xllamacpp wheel: logits of every position, token ids and image features of GGUF files.

Run as a script, in a process of its own, it does a job: what llama.cpp does not like ends its process. The wheel's own
interface tells the likeliest next tokens only, so llama.h and mtmd.h are called by ctypes; parameters are structures
passed by value, of which a larger one with the defaults in front does as well.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MARKER = "<__media__>"


def llama_cpp(
    folder: Path,
    *,
    rows: Any = (),
    scored: Any = (),
    texts: Any = (),
    prompts: Any = (),
    greedy: int = 0,
    image: np.ndarray | None = None,
    prompt: str = "",
    image_tokens: tuple[int, int] = (-1, -1),
    context: int = 1024,
) -> dict[str, Any]:
    """What llama.cpp makes of the GGUF files in a folder.

    Returns: `logits` of each row of token ids float[tokens, words], `losses` float[tokens - 1] of each row that is
    `scored` (nats), `ids` of each text with the marks that it gets, `tokens`, the next `greedy` of each of the prompts
    (rows of ids); and of an image uint8[height, width, 3] its `features` float[tokens, embed] and the `answer`
    float[words], the logits behind a prompt with `MARKER`; `image_tokens` are --image-min-tokens and
    --image-max-tokens (-1: llama.cpp's own).
    """
    job = {
        "model": str(next(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))),
        "mmproj": next(map(str, folder.glob("mmproj-*.gguf")), None) if image is not None else None,
        "rows": [[int(token) for token in row] for row in rows],
        "scored": [[int(token) for token in row] for row in scored],
        "prompts": [[int(token) for token in row] for row in prompts],
        "texts": list(texts),
        "greedy": greedy,
        "prompt": prompt,
        "image_tokens": image_tokens,
        "context": context,
        "image": None if image is None else str(folder / "image.npy"),
    }
    if image is not None:
        np.save(folder / "image.npy", image)
    done = subprocess.run([sys.executable, __file__, json.dumps(job), str(folder / "done.npz")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    with np.load(folder / "done.npz") as found:
        named: dict[str, Any] = {"logits": [], "losses": [], "ids": [], "tokens": []}
        for name in found.files:
            kind, _, number = name.partition("_")
            named[kind] = [*named[kind], found[name]] if number else found[name]
    return named


class _Opaque(ctypes.Structure):
    _fields_ = [("values", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class _Text(ctypes.Structure):
    _fields_ = [
        ("text", ctypes.c_char_p),
        ("size", ctypes.c_size_t),
        ("add_special", ctypes.c_bool),
        ("parse_special", ctypes.c_bool),
    ]


_POINTERS = (
    "llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory",
    "mtmd_init_from_file", "mtmd_bitmap_init", "mtmd_input_chunks_init", "mtmd_input_chunks_get",
)  # fmt: skip
_FLOATS = ("llama_get_logits", "llama_get_logits_ith", "mtmd_get_output_embd")
_PARAMETERS = ("llama_model_default_params", "llama_context_default_params", "mtmd_context_params_default")


def _library() -> Any:
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    for names, kind in (
        (_POINTERS, ctypes.c_void_p),
        (_PARAMETERS, _Opaque),
        (_FLOATS, ctypes.POINTER(ctypes.c_float)),
    ):
        for name in names:
            getattr(library, name).restype = kind
    library.llama_batch_init.restype = _Batch
    library.mtmd_input_chunks_size.restype = library.mtmd_image_tokens_get_n_tokens.restype = ctypes.c_size_t
    library.mtmd_input_chunk_get_n_tokens.restype = ctypes.c_size_t
    return library


class _Llama:
    def __init__(self, path: str, context: int):
        self.lib = lib = _library()
        lib.llama_backend_init()
        self.model = ctypes.c_void_p(lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params()))
        assert self.model, f"llama.cpp does not load {path}"
        parameters = lib.llama_context_default_params()
        parameters.values[0], parameters.values[1], parameters.values[2] = context, context, context
        self.context = ctypes.c_void_p(lib.llama_init_from_model(self.model, parameters))
        assert self.context
        self.vocab = ctypes.c_void_p(lib.llama_model_get_vocab(self.model))
        self.words = lib.llama_vocab_n_tokens(self.vocab)
        lib.llama_set_n_threads(self.context, 1, 1)  # several wait for each other by spinning

    def ids(self, text: str) -> np.ndarray:
        content, room = text.encode(), (ctypes.c_int32 * (len(text.encode()) + 8))()
        flags = ctypes.c_bool(True), ctypes.c_bool(True)
        count = self.lib.llama_tokenize(self.vocab, content, len(content), room, len(room), *flags)
        assert count >= 0
        return np.array(room[:count], np.int32)

    def forget(self) -> None:
        self.lib.llama_memory_clear(ctypes.c_void_p(self.lib.llama_get_memory(self.context)), ctypes.c_bool(True))

    def logits(self, tokens: Any, first: int = 0) -> np.ndarray:
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), first + i, 1, 1
            batch.seq_id[i][0] = 0
        assert self.lib.llama_decode(self.context, batch) == 0
        found = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (len(tokens), self.words)).copy()
        self.lib.llama_batch_free(batch)
        return found

    def greedy(self, tokens: Any, count: int) -> np.ndarray:
        self.forget()
        last, made = self.logits(tokens)[-1], []
        for i in range(count):
            made.append(int(last.argmax()))
            last = self.logits(made[-1:], len(tokens) + i)[-1]
        return np.array(made, np.int32)

    def see(self, mmproj: str, image: np.ndarray, prompt: str, limits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        lib = self.lib
        self.forget()
        parameters = lib.mtmd_context_params_default()
        parameters.values[12], parameters.values[13] = (limit % 2**32 for limit in limits)
        tower = ctypes.c_void_p(lib.mtmd_init_from_file(mmproj.encode(), self.model, parameters))
        assert tower, f"llama.cpp does not load {mmproj}"
        height, width, _ = image.shape
        bitmap = ctypes.c_void_p(
            lib.mtmd_bitmap_init(width, height, np.ascontiguousarray(image).ctypes.data_as(ctypes.c_char_p))
        )
        chunks = ctypes.c_void_p(lib.mtmd_input_chunks_init())
        text = _Text(prompt.encode(), len(prompt.encode()), True, True)
        assert lib.mtmd_tokenize(tower, chunks, ctypes.byref(text), ctypes.byref(bitmap), ctypes.c_size_t(1)) == 0
        past, features = ctypes.c_int32(0), []
        for i in range(lib.mtmd_input_chunks_size(chunks)):
            chunk = ctypes.c_void_p(lib.mtmd_input_chunks_get(chunks, ctypes.c_size_t(i)))
            if lib.mtmd_input_chunk_get_type(chunk) == 1:  # an image
                assert lib.mtmd_encode_chunk(tower, chunk) == 0
                shape = lib.mtmd_input_chunk_get_n_tokens(chunk), lib.llama_model_n_embd_inp(self.model)
                features.append(np.ctypeslib.as_array(lib.mtmd_get_output_embd(tower), shape).copy())
        done = lib.mtmd_helper_eval_chunks(
            tower, self.context, chunks, 0, 0, 512, ctypes.c_bool(True), ctypes.byref(past)
        )
        assert done == 0
        answer = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), (self.words,)).copy()
        return np.concatenate(features), answer


def _losses(logits: np.ndarray, row: Any) -> np.ndarray:
    top = logits.max(axis=-1, keepdims=True)
    norm = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
    return norm - np.take_along_axis(logits, np.asarray(row)[1:, None], axis=-1)[:, 0]


def _run(job: dict[str, Any]) -> dict[str, np.ndarray]:
    llama, found = _Llama(job["model"], job["context"]), {}
    for i, row in enumerate(job["rows"]):
        llama.forget()
        found[f"logits_{i}"] = llama.logits(row)
    for i, row in enumerate(job["scored"]):
        llama.forget()
        found[f"losses_{i}"] = _losses(llama.logits(row)[:-1].astype(np.float64), row)
    for i, row in enumerate(job["prompts"]):
        found[f"tokens_{i}"] = llama.greedy(row, job["greedy"])
    for i, text in enumerate(job["texts"]):
        found[f"ids_{i}"] = llama.ids(text)
    if job["image"] is not None:
        found["features"], found["answer"] = llama.see(
            job["mmproj"], np.load(job["image"]), job["prompt"], job["image_tokens"]
        )
    return found


if __name__ == "__main__":
    np.savez(sys.argv[2], **_run(json.loads(sys.argv[1])))
