"""Errors of bfloat16 gradients of vlmprune and of PyTorch + peft against float32, for equal models, rows and adapters.

    python benchmarks/bf16_gradients.py --work=DIR [--folder=DIR/smollm2-135m] [--batch=10x128] [--draws=4]

The loss and the models are those of train_step.py, without dropout. Gradients are computed for one row at a time, with
`--draws` random adapters. The error is |g - g32| / |g32| over all adapters, estimated to 0.3 % from random projections
to 131,072 numbers. The side "jitter" is float32 with word embeddings changed by up to 2^-9 (relative), as by rounding
to bfloat16. Weights are rounded to bfloat16 on all sides. Prints one JSON line per row with the medians and maxima
over the draws, and one line for all rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import train_step as base

SKETCH = 1 << 17
SIDES = ("float32", "jitter", "ours", "peft")  # the others are compared with the first one

# {(module path in a layer, layer): array} of adapter weights or of their gradients.
Flat = dict[tuple[str, int], np.ndarray]
Gradient = Callable[[Flat, np.ndarray, int], Flat]


def sketch(gradient: Flat) -> np.ndarray:
    """Return a float64[SKETCH] random projection that preserves norms and differences."""
    signs, total = np.random.default_rng(7), np.zeros(SKETCH)
    for name in sorted(gradient):
        values = gradient[name].ravel().astype(np.float64)
        values *= 2.0 * signs.integers(0, 2, values.size, dtype=np.int8) - 1.0
        total += np.pad(values, (0, -values.size % SKETCH)).reshape(-1, SKETCH).sum(0)
    return total


def ours(args: argparse.Namespace, dtype: str, jitter: bool) -> tuple[Flat, Gradient]:
    """Return the student's adapters (for their shapes) and the gradient function of vlmprune's training step."""
    import jax
    import jax.numpy as jnp

    import vlmprune_jax as vp
    from vlmprune_jax.core.models.params import flatten, unflatten
    from vlmprune_jax.core.recovery.config import LossConfig
    from vlmprune_jax.core.recovery.losses import combine, loss_sums, term_weights
    from vlmprune_jax.core.recovery.program import step_context
    from vlmprune_jax.core.recovery.terms import make_teacher
    from vlmprune_jax.core.recovery.trainable import assign_groups, partition

    student = base.adapted(vp.load(args.work / "student", dtype="bfloat16"), 0.0)
    flat = flatten(student.params)
    trainable, frozen = partition(flat, assign_groups(list(flat), "lora"))
    frozen = {path: leaf.astype(dtype) for path, leaf in frozen.items()}
    original = vp.load(args.folder, dtype="bfloat16")
    taught = jax.tree.map(lambda leaf: leaf.astype(dtype), original.params)
    loss = LossConfig(ce=0.5, l2=0.5)
    teacher = make_teacher(loss, student.cfg, original.cfg, None)
    table = "text/embed_tokens/weight"

    @jax.jit
    def gradient(adapters: Any, fixed: Any, taught: Any, ids: jax.Array) -> Any:
        def total(adapters: Any) -> jax.Array:
            params = unflatten({**fixed, **{path: leaf.astype(dtype) for path, leaf in adapters.items()}})
            mask = jnp.ones_like(ids)
            batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
            options = {"teacher": teacher, "teacher_params": taught, "remat": "dots", "dropout_key": None}
            sums = loss_sums(params, student.cfg, batch, loss, **options)
            return combine(sums, term_weights(loss, student.cfg, ids, mask), loss)

        return jax.grad(total)(adapters)

    def named(flat: Any) -> Flat:
        return {(path.split("/", 3)[3], i): np.asarray(x) for path, leaf in flat.items() for i, x in enumerate(leaf)}

    def compute(adapters: Flat, row: np.ndarray, draw: int) -> Flat:
        stacked = {
            path: jnp.stack([adapters[path.split("/", 3)[3], i].reshape(leaf.shape[1:]) for i in range(len(leaf))])
            for path, leaf in trainable.items()
        }
        off = np.random.default_rng(draw).uniform(-(2.0**-9), 2.0**-9, frozen[table].shape) if jitter else 0.0
        fixed = {**frozen, table: (frozen[table] * (1 + off)).astype(dtype)} if jitter else frozen
        with step_context(None, "bfloat16"):
            return named(gradient(stacked, fixed, taught, jnp.asarray(row[None])))

    return named(trainable), compute


def peft(args: argparse.Namespace) -> tuple[Flat, Gradient]:
    """Return adapters and gradient function of PyTorch + peft: bfloat16 base, float32 adapters, autocast."""
    import torch
    from peft import PeftModel
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    teacher = AutoModelForCausalLM.from_pretrained(args.folder, **options).eval()
    base_model = AutoModelForCausalLM.from_pretrained(args.work / "student", **options)
    student = PeftModel.from_pretrained(base_model, args.work / "adapter", is_trainable=True).eval()  # no dropout
    model, trained = student.base_model.model, {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            layer, module, projection, half = name.split(".layers.")[1].split(".")[:4]
            trained[f"{module}/{projection}/{half.lower()}", int(layer)] = parameter

    def compute(adapters: Flat, row: np.ndarray, draw: int) -> Flat:
        for name, parameter in trained.items():
            parameter.data = torch.from_numpy(adapters[name].reshape(parameter.shape).copy())
        inputs = torch.from_numpy(row[None]).long()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            with torch.no_grad():
                target = teacher.model(inputs, use_cache=False).last_hidden_state
            hidden = model.model(inputs, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        ce = functional.cross_entropy(logits.float().flatten(0, 1), inputs[:, 1:].flatten())
        (0.5 * ce + 0.5 * functional.mse_loss(hidden.float(), target.float())).backward()
        found = {name: parameter.grad.numpy() for name, parameter in trained.items()}
        student.zero_grad()
        return found

    return {name: parameter.detach().numpy() for name, parameter in trained.items()}, compute


def draw_adapters(like: Flat, seed: int) -> Flat:
    """Draw random adapter weights with the scales of `train_step.adapted`, in order of their names."""
    draw = np.random.default_rng(100 + seed)
    scales = {True: 0.02, False: 0.001}
    return {
        name: np.float32(scales[name[0].endswith("lora_a")]) * draw.standard_normal(like[name].size, np.float32)
        for name in sorted(like)
    }


def child(args: argparse.Namespace) -> None:
    """Compute one side's gradients; write their random projections, float64[rows, draws, SKETCH], to a file."""
    ids = np.load(args.work / "ids.npy")
    if args.child == "peft":
        like, gradient = peft(args)
    else:
        like, gradient = ours(args, "bfloat16" if args.child == "ours" else "float32", args.child == "jitter")
    found = [[sketch(gradient(draw_adapters(like, draw), row, draw)) for draw in range(args.draws)] for row in ids]
    np.save(args.work / f"{args.child}.npy", np.asarray(found))


def errors(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return {side: relative gradient errors float64[rows, draws]}, and "norm", that of the float32 gradients."""
    exact, *others = (np.load(args.work / f"{side}.npy") for side in SIDES)
    norm = np.linalg.norm(exact, axis=-1)
    return {"norm": norm} | {
        side: np.linalg.norm(found - exact, axis=-1) / norm for side, found in zip(SIDES[1:], others, strict=True)
    }


def summary(found: dict[str, np.ndarray], rows: Iterable[int]) -> dict[str, Any]:
    chosen = {name: values[list(rows)] for name, values in found.items()}
    low_high = [round(float(value), 2) for value in (chosen["norm"].min(), chosen["norm"].max())]
    medians = {f"{side}_median": round(float(np.median(chosen[side])), 3) for side in SIDES[1:]}
    return {"norm": low_high, **medians, **{f"{side}_max": round(float(chosen[side].max()), 3) for side in SIDES[1:]}}


def main() -> None:
    """Create the models, run every side in its own process, and print the gradient errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="the teacher's Hugging Face folder")
    parser.add_argument("--work", type=Path, required=True, help="where models and gradients are written")
    parser.add_argument("--batch", default="10x128", help="rows x tokens")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is None:
        args.folder = base.smollm2()
    if args.child:
        child(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    rows, length = args.batch.split("x")
    made = [f"--folder={args.folder}", f"--work={args.work}", f"--batch={args.batch}", "--child=make"]
    subprocess.run([sys.executable, base.__file__, *made], env=base.ENVIRONMENT, check=True)
    for side in SIDES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--child={side}"], env=base.ENVIRONMENT, check=True)
    found = errors(args)
    for row in range(int(rows)):
        print(json.dumps({"row": row, **summary(found, [row])}), flush=True)
    print(json.dumps({"rows": int(rows), "tokens": int(length), **summary(found, range(int(rows)))}), flush=True)


if __name__ == "__main__":
    main()
