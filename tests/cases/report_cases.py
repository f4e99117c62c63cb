"""Workdirs that a report can be built from."""

from __future__ import annotations

import json

import numpy as np
from prune_cases import EQUAL, config, model

from vlmprune_jax.core.config import LayerShape
from vlmprune_jax.evaluation.metrics import Metric
from vlmprune_jax.evaluation.metrics.exact_match import EXACT_MATCH
from vlmprune_jax.models.params import count_params
from vlmprune_jax.prune import Scores, fingerprint, make_plan
from vlmprune_jax.report.result import make_result, make_run

CFG = config((LayerShape(4, 4, 12),) * len(EQUAL))
GROUPS = {"yes": {"questions": 30, "accuracy": 0.9}, "<b>": {"questions": 10, "accuracy": 0.5}}


def old_run(workdir, method, recovery, accuracy, **changes):
    one = model(CFG)
    draw = np.random.default_rng(3)
    if method == "depth":
        importance = np.arange(5, 0, -1) / 10
        scores = Scores("block_influence", fingerprint(one), {}, importance=importance)
    else:
        heads, mlp = tuple(draw.random(4) for _ in EQUAL), tuple(draw.random(12) for _ in EQUAL)
        scores = Scores("taylor", fingerprint(one), {"gqa": "groups"}, heads=heads, mlp=mlp)
    plan = make_plan(scores, CFG, method=method, ratio=0.3)
    scores.save(workdir / method / "scores.npz")
    plan.to_json(workdir / method / "plan.json")
    name = method if recovery == "none" else f"{method}-{recovery}"
    return {
        "name": name,
        "method": method,
        "recovery": recovery,
        "ratio_asked": 0.3,
        "ratio_reached": plan.reached,
        "parameters": plan.parameters_after,
        "data_fraction": 0.0 if recovery == "none" else 0.05,
        "accuracy": accuracy,
        "retained": 100 * accuracy / 0.8,
        "seconds": 12.34,
        "by_answer": GROUPS,
        "plan": f"{method}/plan.json",
        "scores": [f"{method}/scores.npz"],
        "path": f"{method}/pruned",
        **changes,
    }


def write_workdir(folder):
    """One evaluation set, in a result of version 1."""
    metrics = folder / "depth" / "sft" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps({"step": i, "ce": 1 / i, "l2": 0.5 / i}) + "\n" for i in range(1, 9)))
    runs = [
        old_run(folder, "depth", "none", 0.25),
        old_run(folder, "depth", "sft", 0.76, metrics="depth/sft/metrics.jsonl", path="depth/sft/recovered"),
        old_run(folder, "width", "none", 0.5),
    ]
    teacher = {"accuracy": 0.8, "questions": 40, "parameters": count_params(CFG), "by_answer": GROUPS}
    result = {"teacher": teacher, "runs": runs, "best": "depth-sft"}
    result["export"] = {"path": "export", "max_abs_logit_difference": 3.2e-6}
    (folder / "result.json").write_text(json.dumps(result))


# How many of the 40 questions each model gets right, the first ones, by where its evaluation lies.
RIGHT = {"eval/teacher": 32, "depth/eval/pruned": 10, "depth/sft/eval/recovered": 30, "width/eval/pruned": 31}


def write_answers(folder):
    """The evaluations behind `write_workdir`, question by question."""
    metric = {"name": "exact_match", **EXACT_MATCH.describe()}
    for place, right in RIGHT.items():
        path = folder / f"{place}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"metric": metric, "values": {"accuracy": right / 40}, "groups": {}, "parameters": 900, "seconds": 1.5}
        scores = {"accuracy": [float(place < right) for place in range(40)]}
        path.write_text(json.dumps({**facts, "questions": 40, "scores": scores}))


UNPRUNED = {"prefill": [100.0, 90.0, 110.0], "decode": [20.0, 19.0, 21.0], "first_token": [0.1, 0.2, 0.3]}
FASTER = {"prefill": [150.0, 140.0, 165.0], "decode": [19.0, 20.0, 20.5], "first_token": [0.05, 0.06, 0.07]}
SPEED = {
    "processor": "Some <b>CPU",
    "load": 0.5,
    "workload": {
        **{"rounds": 3, "prompt_tokens": 640, "new_tokens": 32, "batch_size": 1}, "image": True, "dtype": "float32"
    },
    "pairs": [
        {
            "models": ["depth", "depth-sft"],
            "unpruned": {**UNPRUNED, "peak_bytes": 1 << 20},
            "pruned": {**FASTER, "peak_bytes": None},
        },
    ],
}  # fmt: skip


_SIDE = {
    **{"model": "teacher", "backend": "llama_cpp", "versions": {"xllamacpp": "1"}, "weights": "Q8_0", "bytes": 1 << 21},
    **{"parameters": 1000, "image": True, "prompt_tokens": 640, **UNPRUNED, "peak_bytes": 1 << 20},
}
BENCH = {
    **{"processor": "Some <b>CPU", "threads": 2, "load": 0.5},
    "workload": {"rounds": 3, "prompt_tokens": 640, "new_tokens": 32, "image": True, "dtype": "float32"},
    "sides": [_SIDE, {**_SIDE, **FASTER, "model": "pruned", "parameters": 800}],
}  # fmt: skip


PLANNED = {
    "topology": "v5e:8x8",
    "chips": 64,
    "mesh": {"data": 1, "fsdp": 64, "tensor": 1},
    "student": {"layers": 27, "parameters": 5_700_000_000},
    "teacher": {"layers": 32, "parameters": 7_000_000_000},
    "batch_size": 64,
    "accumulation": 2,
    "remat": "full",
    "tokens_per_row": 2048,
    "images_per_row": 1,
    "tokens_buckets": [768, 2048],
    "images_buckets": [1],
    "feature_cache": False,
    "teacher_top_k": 0,
    "hbm": {"arguments": 2 << 30, "temporaries": 3 << 29, "free": 12 << 30},
    "flops": {
        **{"executed": 3.26e15, "model": 2.51e15},
        **{"student": 1.5e15, "teacher": 1e15, "attention": 7e12, "vision": 3e12},
    },
    "received": {"all-gather": 37 << 30},
    "seconds": {"step": 0.258, "compute": 0.258, "memory": 0.02, "interconnect": 0.19},
    "mfu": 0.771,
    "tokens_per_second": 254_000.0,
    "steps": 520,
    "hours": 0.0373,
    "chip_hours": 2.385,
    "compile_seconds": 68.0,
}

METRICS = {
    "docs": {"name": "anls", **Metric("anls", None).describe()},
    "mme": {"name": "mme_p", **Metric("perception", None, full=2000.0, unit="").describe()},
    "wiki": {"name": "bpb", **Metric("bits", None, full=None, unit="bit", higher_is_better=False).describe()},
}


def found(anls, perception, bits):
    """What the evaluation stage reports of one model."""
    values = {"docs": {"anls": anls}, "mme": {"perception": perception, "OCR": 50.0}, "wiki": {"bits": bits}}
    counts = {"docs": {"questions": 40}, "mme": {"questions": 30}, "wiki": {"tokens": 2000}}
    groups = {"OCR": {"questions": 2, "perception": 50.0, "OCR": 50.0}}
    return {
        name: {
            **{
                "metric": metric,
                "values": values[name],
                "parameters": count_params(CFG),
                "seconds": 1.5,
                **counts[name],
            },
            "groups": groups if name == "mme" else {},
        }
        for name, metric in METRICS.items()
    }


def write_several(workdir):
    """The same models on several sets, in version 2."""
    result, teacher = json.loads((workdir / "result.json").read_text()), found(0.8, 1500.0, 1.0)
    models = [found(0.4, 1200.0, 2.0), found(0.6, 1350.0, 1.25), found(0.2, 1500.0, 1e9)]
    own = ("accuracy", "retained", "by_answer", "name", "path")
    runs = [
        make_run(old["name"], {k: v for k, v in old.items() if k not in own}, model, teacher, old["path"])
        for old, model in zip(result["runs"], models, strict=True)
    ]
    (workdir / "result.json").write_text(json.dumps(make_result(teacher, runs, "depth-sft", result["export"])))
