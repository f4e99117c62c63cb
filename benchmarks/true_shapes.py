"""Time of a question in llama.cpp at the true shapes of models whose towers take 4 to over 90 % of the prefill.

    python benchmarks/true_shapes.py --work=/big/disk [--models=smolvlm-256m,gemma3] [--rounds=5] [--save=FILE.json.xz]
    python benchmarks/true_shapes.py --saved FILE.json.xz

Weights are random: time follows from shapes and formats. Each model (`models.py`) is written whole and with 30 % fewer
layers in decoder and tower, in F16, Q8_0 and Q4_0 (LLaVA in Q4_0 only). A process for each file measures the phases of
a question apart: the tower, the image in the decoder, 64 tokens of text, and one decoding step; the last two of 16
questions on one image as well, which share its keys and values. Files are measured in turns. A cut takes its phases
from these: "tower 30 %" has the tower of the smaller file and all else of the whole one. Half of the image tokens is an
image of half the size, or half of its features where images have one size (as many tokens of text in the decoder).
Answers have 16 tokens. `--layers` keeps so many layers of each stack, to try the benchmark. Needs the [test] extra, and
free disk space of five times the largest checkpoint (LLaVA: 14 GB).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import lzma
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cases")]

import numpy as np  # noqa: E402
from full_size import make_checkpoint  # noqa: E402
from models import MODELS  # noqa: E402
from plan import PROCESSORS  # noqa: E402

REMOVED, TEXT, ANSWER, ROWS, BATCH = 0.3, 64, 16, 16, 512
FORMATS: dict[str, dict[str, Any]] = {
    "F16": {"dtype": "float16"},
    "Q8_0": {"quantize": "q8_0"},
    "Q4_0": {"quantize": "q4_0"},
}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336}
# What the tokenizers of these models mark images with: llama.cpp looks the words up.
MARKS = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>",
         "<img>", "</img>", "<IMG_CONTEXT>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<start_of_image>",
         "<end_of_image>", "<image_soft_token>", "\n\n")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Height and width of a model's image in pixels, of one with half of the tokens (None: one size), and formats."""

    image: tuple[int, int]
    half: tuple[int, int] | None = None
    formats: tuple[str, ...] = tuple(FORMATS)


CASES = {
    "smolvlm-256m": Case((1024, 2048), (512, 2048)),
    "internvl3-2b": Case((448, 2240), (448, 896)),  # 5 and 2 tiles, each with a thumbnail
    "qwen3vl-2b": Case((768, 768), (384, 768)),
    "gemma3": Case((896, 896)),
    "llava": Case((336, 336), formats=("Q4_0",)),
}
CUTS = {  # name -> (file of the tower, file of the decoder, image)
    "whole": ("whole", "whole", "all"),
    "layers 30 %": ("whole", "fewer", "all"),
    "tower 30 %": ("fewer", "whole", "all"),
    "half of the tokens": ("whole", "whole", "half"),
    "layers + tower": ("fewer", "fewer", "all"),
    "layers + tokens": ("whole", "fewer", "half"),
}


# --- files -----------------------------------------------------------------------------------------------------------


def reduced(config: dict[str, Any], keep: Callable[[int], int]) -> dict[str, Any]:
    """Return a config with `keep(layers)` layers in its decoder and its tower."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    text["num_hidden_layers"] = keep(text["num_hidden_layers"])
    depth = "depth" if "depth" in vision else "num_hidden_layers"
    before, vision[depth] = vision[depth], keep(vision[depth])
    if indexes := vision.get("deepstack_visual_indexes"):
        vision["deepstack_visual_indexes"] = sorted({index * vision[depth] // before for index in indexes})
    return {**config, "text_config": text, "vision_config": vision}


def write_files(name: str, work: Path, layers: int) -> None:
    """Write the GGUF files of a model below work/NAME/{whole,fewer}/FORMAT; checkpoints go when they are converted."""
    from gguf_cases import byte_tokenizer

    import vlmprune_jax as vp
    from vlmprune_jax.io.checkpoints.read import open_model

    trial: Callable[[int], int] = lambda count: min(count, layers or count)  # noqa: E731
    whole = reduced(MODELS[name], trial)
    configs = {"whole": whole, "fewer": reduced(whole, lambda count: count - max(1, round(REMOVED * count)))}
    for kind, config in configs.items():
        source = work / name / kind / "checkpoint"
        make_checkpoint(config, source, spread=0.02)
        byte_tokenizer(source, MARKS)
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **PROCESSORS.get(name, CLIP)}
        (source / "preprocessor_config.json").write_text(json.dumps(settings))
        for form in CASES[name].formats:
            out = source.with_name(form)
            vp.save(open_model(source), out, source_dir=source, format="gguf", **FORMATS[form])
        shutil.rmtree(source)


# --- one file in llama.cpp -------------------------------------------------------------------------------------------


class Session:
    """A GGUF model with its tower in llama.cpp, and the seconds of what it computes."""

    def __init__(self, folder: Path, room: int, threads: int):
        from llama_cpp import _library

        self.lib = lib = _library()
        lib.llama_backend_init()
        tower = next(folder.glob("mmproj-*.gguf"))
        (file,) = (path for path in folder.glob("*.gguf") if path != tower)
        self.model = ctypes.c_void_p(
            lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        )
        parameters = lib.llama_context_default_params()
        parameters.values[0], parameters.values[1], parameters.values[2] = ROWS * room, BATCH, BATCH
        parameters.values[3] = ROWS
        self.context = ctypes.c_void_p(lib.llama_init_from_model(self.model, parameters))
        lib.llama_set_n_threads(self.context, threads, threads)
        parameters = lib.mtmd_context_params_default()
        parameters.values[1] = threads
        self.tower = ctypes.c_void_p(lib.mtmd_init_from_file(str(tower).encode(), self.model, parameters))
        if not (self.model and self.context and self.tower):
            sys.exit(f"llama.cpp does not load {folder}")
        self.memory = ctypes.c_void_p(lib.llama_get_memory(self.context))
        self.words = lib.llama_vocab_n_tokens(ctypes.c_void_p(lib.llama_model_get_vocab(self.model)))

    def decode(self, rows: int, count: int, first: int) -> float:
        """Feed `count` tokens to each of the rows, from position `first` on; return the seconds."""
        places = [(row, first + i, i == count - 1) for row in range(rows) for i in range(count)]
        started = time.perf_counter()
        for at in range(0, len(places), BATCH):
            part = places[at : at + BATCH]
            batch = self.lib.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, (row, position, last) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = 40 + i % 50, position, 1, last
                batch.seq_id[i][0] = row
            if self.lib.llama_decode(self.context, batch):
                sys.exit("llama.cpp cannot decode: its context is too small")
            self.lib.llama_synchronize(self.context)
            self.lib.llama_batch_free(batch)
        return time.perf_counter() - started

    def see(self, size: tuple[int, int]) -> tuple[float, float, int, int]:
        """Return the seconds of the tower and of an image in the decoder, its tokens, and the next position."""
        from llama_cpp import MARKER, _Text

        lib, (height, width) = self.lib, size
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        bitmap = ctypes.c_void_p(lib.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.c_char_p)))
        chunks, prompt = ctypes.c_void_p(lib.mtmd_input_chunks_init()), MARKER.encode()
        text = _Text(prompt, len(prompt), True, True)
        if lib.mtmd_tokenize(self.tower, chunks, ctypes.byref(text), ctypes.byref(bitmap), ctypes.c_size_t(1)):
            sys.exit("llama.cpp cannot prepare the image")
        encoding, decoding, tokens, past = 0.0, 0.0, 0, ctypes.c_int32(0)
        for i in range(lib.mtmd_input_chunks_size(chunks)):
            chunk, started = ctypes.c_void_p(lib.mtmd_input_chunks_get(chunks, ctypes.c_size_t(i))), time.perf_counter()
            after, place = ctypes.c_int32(past.value), (past, 0, BATCH)  # text adds to what is there
            if lib.mtmd_input_chunk_get_type(chunk) == 1:  # an image
                failed = lib.mtmd_encode_chunk(self.tower, chunk)
                encoding += time.perf_counter() - started
                features, started = lib.mtmd_get_output_embd(self.tower), time.perf_counter()
                failed = failed or lib.mtmd_helper_decode_image_chunk(
                    self.tower, self.context, chunk, features, *place, ctypes.byref(after), None, None
                )
                tokens += lib.mtmd_input_chunk_get_n_tokens(chunk)
            else:
                failed = lib.mtmd_helper_eval_chunk_single(
                    self.tower, self.context, chunk, *place, ctypes.c_bool(False), ctypes.byref(after)
                )
            if failed:
                sys.exit("llama.cpp cannot compute the image")
            self.lib.llama_synchronize(self.context)
            decoding, past = decoding + time.perf_counter() - started, after
        return encoding, decoding, tokens, past.value

    def share(self) -> None:
        """Give every row the keys and values of the first."""
        for row in range(1, ROWS):
            self.lib.llama_memory_seq_cp(self.memory, 0, row, -1, -1)

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.memory, ctypes.c_bool(True))


def phases(session: Session, image: tuple[int, int] | None, tokens: int) -> dict[str, float]:
    """Return the seconds of the phases of a question; without an image, `tokens` of text are in its place."""
    session.forget()
    if image is None:
        tower, shown, past = 0.0, session.decode(1, tokens, 0), tokens
    else:
        tower, shown, tokens, past = session.see(image)
    session.share()
    found = {"tower": tower, "image": shown, "tokens": tokens}
    for rows, text, step in ((1, "text", "step"), (ROWS, "texts", "steps")):
        found[text] = session.decode(rows, TEXT, past)
        found[step] = session.decode(rows, 1, past + TEXT)  # which warms up
        found[step] = sum(session.decode(rows, 1, past + TEXT + 1 + i) for i in range(ANSWER - 1)) / (ANSWER - 1)
        for row in range(ROWS):
            session.lib.llama_memory_seq_rm(session.memory, row, past, -1)
    return found


def measure(name: str, folder: Path, threads: int) -> dict[str, dict[str, float]]:
    """Return {"all": phases, "half": phases} of one file."""
    case = CASES[name]
    session = Session(folder, 2048 + TEXT + 2 * ANSWER, threads)
    whole = phases(session, case.image, 0)
    if case.half is not None:
        return {"all": whole, "half": phases(session, case.half, 0)}
    half = phases(session, None, int(whole["tokens"]) // 2)
    return {"all": whole, "half": {**half, "tower": whole["tower"]}}


# --- all files, and the table ----------------------------------------------------------------------------------------


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Return {MODEL: {FORMAT: {"whole"/"fewer": a dictionary of phases per round}}} of all models."""
    found: dict[str, Any] = {}
    for name in args.models.split(","):
        if not (args.work / name).exists():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--make={name}"], check=True)
        found[name] = {form: {"whole": [], "fewer": []} for form in CASES[name].formats}
        for _ in range(args.rounds):
            for form, kinds in found[name].items():
                for kind, rounds in kinds.items():
                    child = [sys.executable, __file__, f"--work={args.work}", f"--threads={args.threads}"]
                    child.append(f"--child={name}/{kind}/{form}")
                    done = subprocess.run(child, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(f"{name}/{kind}/{form} ends with {done.returncode}: {done.stderr[-3000:]}")
                    rounds.append(json.loads(done.stdout.splitlines()[-1]))
        if not args.keep:
            shutil.rmtree(args.work / name)
    return found


def seconds(tower: dict[str, float], decoder: dict[str, float], rows: int) -> float:
    """Return the seconds of one question, or of `ROWS` on one image, from the phases of two files."""
    text, step = ("text", "step") if rows == 1 else ("texts", "steps")
    return tower["tower"] + decoder["image"] + decoder[text] + (ANSWER - 1) * decoder[step]


def print_table(found: dict[str, Any]) -> None:
    """Print a row per model, format and cut: tower, prefill and answer of a question, and gains over the whole model.

    Gains are ratios within a round: the median, and the range in brackets.
    """
    header = ("model, format", "cut", "tower, s", "prefill, s", "answer, s", "1 question, x", f"{ROWS} questions, x")
    print(f"|{'|'.join(header)}|\n{'|---' * len(header)}|")
    for name, formats in found.items():
        for form, files in formats.items():
            pairs = [*zip(files["whole"], files["fewer"], strict=True)]
            rounds = [{"whole": whole, "fewer": fewer} for whole, fewer in pairs]
            for cut, (tower, decoder, image) in CUTS.items():
                parts = [(one[tower][image], one[decoder][image]) for one in rounds]
                values = (
                    [of_tower["tower"] for of_tower, _ in parts],
                    [of["image"] + of["text"] for _, of in parts],
                    [(ANSWER - 1) * of["step"] for _, of in parts],
                )
                cells = [f"{statistics.median(value):.2f}" for value in values]
                for rows in (1, ROWS):
                    gains = [
                        seconds(one["whole"]["all"], one["whole"]["all"], rows) / seconds(*part, rows)
                        for one, part in zip(rounds, parts, strict=True)
                    ]
                    cells.append(f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})")
                print(f"|{name}, {form}|{cut}|{'|'.join(cells)}|")


def main() -> None:
    """Write and measure the files of each model, or read saved numbers; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the files, which are removed at the end")
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the files in --work, and use those that are there")
    parser.add_argument("--save", type=Path, help="write the numbers to this .json.xz")
    parser.add_argument("--saved", type=Path, help="print the table of these numbers, measure nothing")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        write_files(args.make, args.work, args.layers)
    elif args.child:
        print(json.dumps(measure(args.child.partition("/")[0], args.work / args.child, args.threads)))
    else:
        if args.saved is None:
            from vlmprune_jax.core.mesh.machine import processor

            found = {"processor": processor(), "threads": args.threads, "models": measured(args)}
        else:
            found = json.loads(lzma.decompress(args.saved.read_bytes()))
        if args.save:
            args.save.write_bytes(lzma.compress((json.dumps(found) + "\n").encode()))
        rounds = len(next(iter(next(iter(found["models"].values())).values()))["whole"])
        print(f"{found['processor']}, {found['threads']} threads, {rounds} rounds\n")
        print_table(found["models"])


if __name__ == "__main__":
    main()
