"""Workdirs that a report can be built from; questions, and the answers of several models."""

from __future__ import annotations

import json

import numpy as np
from msgspec.structs import replace
from PIL import Image
from prune_cases import EQUAL, config, layer_scores, model, unit_scores
from stack_cases import decoder_layer

from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import Scores, fingerprint
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.evaluation.metrics import Metric
from vlmprune_jax.run.evaluation.metrics.texts import EXACT_MATCH
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.comparison import compare, describe_sets, unpruned_of
from vlmprune_jax.run.workdir.evaluation import Evaluated, Group, MetricInfo
from vlmprune_jax.run.workdir.result import Export, Result, Run, read_result
from vlmprune_jax.run.workdir.speed import Bench, BenchSide, Measurement, Pair, Speed, SpeedWorkload
from vlmprune_jax.run.workdir.steps import STEPS, StepRecord, Steps
from vlmprune_jax.run.workdir.tpu_plan import Hbm, PlannedModel, PlannedStep

CFG = config((decoder_layer(4, 4, 12),) * len(EQUAL))
SIZE = count_params(CFG)
GROUPS = {
    "yes": Group(questions=30, values={"accuracy": 0.9}), "<b>": Group(questions=10, values={"accuracy": 0.5})
}  # fmt: skip
FACTS = {
    "method": "depth", "criterion": "block_influence", "target_ratio": 0.3, "actual_ratio": 0.31, "recovery": "none",
    "parameters": 60, "seconds": 1.5, "plan": "plan.json", "scores": ["scores.npz"], "path": "pruned",
}  # fmt: skip
EXPORT = Export(path="export", backend="jax", max_abs_logit_difference=3.2e-6, tolerance=1e-4, seconds=0.5)


def result_of(teacher, runs, best=None, **more):
    """A result of runs (`Run`), best the first unless named."""
    return Result(
        sets=describe_sets(teacher), teacher=unpruned_of(teacher), runs=runs, best=best or runs[0].name, **more
    )


def evaluated(accuracy, groups=GROUPS, **changes):
    """An evaluation by exact match, on 40 questions."""
    info = MetricInfo(name="exact_match", **EXACT_MATCH.describe())
    facts = {"groups": groups, "counted": "questions", "count": 40, "parameters": SIZE, "seconds": 1.5, **changes}
    return Evaluated(metric=info, values={"accuracy": accuracy}, **facts)


def pruned_run(workdir, method, recovery, accuracy, **changes):
    """A run of a plan and scores, which are written."""
    one = model(CFG)
    draw = np.random.default_rng(3)
    if method == "depth":
        importance = np.arange(5, 0, -1) / 10
        scores = Scores("block_influence", fingerprint(one), {}, values=layer_scores(importance))
    else:
        heads, mlp = tuple(draw.random(4) for _ in EQUAL), tuple(draw.random(12) for _ in EQUAL)
        scores = Scores("taylor", fingerprint(one), {"gqa": "groups"}, values=unit_scores(heads, mlp))
    plan = make_plan(scores, CFG, method=method, ratio=0.3)
    scores.save(workdir / method / "scores.npz")
    plan.to_json(workdir / method / "plan.json")
    facts = {
        "name": method if recovery == "none" else f"{method}-{recovery}", "method": method, "recovery": recovery,
        "criterion": scores.criterion, "actual_ratio": plan.actual_ratio, "parameters": plan.parameters_after,
        "data_fraction": 0.0 if recovery == "none" else 0.05, "seconds": 12.34, "plan": f"{method}/plan.json",
        "scores": [f"{method}/scores.npz"], "path": f"{method}/pruned",
    }  # fmt: skip
    evaluation = compare({"questions": evaluated(accuracy)}, {"questions": evaluated(0.8)})
    return Run(**{**FACTS, **facts, **changes}, evaluation=evaluation)


def write_workdir(folder):
    """One evaluation set."""
    metrics = folder / "depth" / "sft" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps({"step": i, "ce": 1 / i, "l2": 0.5 / i}) + "\n" for i in range(1, 9)))
    runs = [
        pruned_run(folder, "depth", "none", 0.25),
        pruned_run(folder, "depth", "sft", 0.76, metrics="depth/sft/metrics.jsonl", path="depth/sft/recovered"),
        pruned_run(folder, "width", "none", 0.5),
    ]
    write_artefact(folder / "result.json", result_of({"questions": evaluated(0.8)}, runs, "depth-sft", export=EXPORT))
    write_artefact(folder / STEPS, Steps(steps=[*steps_of("depth", "sft"), *steps_of("width", "sft")]))


def steps_of(variant, recovery, folder=None):
    """The steps of a prune variant and a recovery, as a run notes them."""
    folder = variant if folder is None else folder
    first = {"name": variant, "recovery": "none", "variant": folder, "folder": folder}
    then = {"name": f"{variant}-{recovery}", "recovery": recovery, "variant": folder, "folder": f"{folder}/{recovery}"}
    return [
        StepRecord(stage="score", about="score", outputs=["scores*.npz"], **first),
        StepRecord(stage="prune", about="prune", outputs=["plan.json"], model="pruned", **first),
        StepRecord(stage="recover", about="recover", model="recovered", **then),
    ]


# How many of the 40 questions each model gets right, the first ones, by where its evaluation lies.
RIGHT = {"eval/teacher": 32, "depth/eval/pruned": 10, "depth/sft/eval/recovered": 30, "width/eval/pruned": 31}


def write_answers(folder):
    """The evaluations behind `write_workdir`, question by question."""
    for place, right in RIGHT.items():
        scores = {"accuracy": [float(place < right) for place in range(40)]}
        write_artefact(folder / f"{place}.json", evaluated(right / 40, {}, parameters=900, scores=scores))


_SLOW = {"prefill": (100.0, 98.0, 103.0), "decode": (20.0, 19.0, 21.0), "first_token": (0.1, 0.2, 0.3)}
_FAST = {"prefill": (150.0, 149.0, 155.0), "decode": (19.0, 20.0, 20.5), "first_token": (0.05, 0.06, 0.07)}
_PROMPT = {"rounds": 3, "prompt_tokens": 640, "new_tokens": 32, "image": True, "dtype": "float32"}
SPEED = Speed(
    processor="Some <b>CPU",
    load=0.5,
    workload=SpeedWorkload(**_PROMPT, batch_size=1),
    pairs=[
        Pair(
            models=["depth", "depth-sft"],
            unpruned=Measurement(**_SLOW, peak_bytes=1 << 20),
            pruned=Measurement(**_FAST, peak_bytes=None),
        )
    ],
)
# Rounds of a busy machine: 5.10 and 7.22 times as fast with 6 of 10 layers.
NOISY = replace(
    SPEED,
    pairs=[
        replace(
            SPEED.pairs[0],
            unpruned=Measurement(
                prefill=(100.0, 60.0, 200.0), decode=(10.0, 4.0, 18.6), first_token=(1.0, 1.0, 1.0), peak_bytes=None
            ),
            pruned=Measurement(
                prefill=(722.0, 700.0, 730.0), decode=(51.0, 50.0, 51.5), first_token=(1.0, 1.0, 1.0), peak_bytes=None
            ),
            prefill_limit=10 / 6,
            decode_limit=10 / 6,
        )
    ],
)
_SIDE = BenchSide(
    model="teacher", backend="llama_cpp", versions={"xllamacpp": "1"}, weights="Q8_0", bytes=1 << 21, parameters=1000,
    image=True, prompt_tokens=640, **_SLOW, peak_bytes=1 << 20,
)  # fmt: skip
BENCH = Bench(
    processor="Some <b>CPU",
    threads=2,
    load=0.5,
    workload=SpeedWorkload(**_PROMPT),
    sides=[_SIDE, replace(_SIDE, **_FAST, model="pruned", parameters=800)],
)
PLANNED = PlannedStep(
    topology="v5e:8x8",
    chips=64,
    mesh={"data": 1, "fsdp": 64, "tensor": 1},
    student=PlannedModel(layers=27, parameters=5_700_000_000),
    teacher=PlannedModel(layers=32, parameters=7_000_000_000),
    batch_size=64,
    accumulation=2,
    remat="full",
    tokens_buckets=[768, 2048],
    images_buckets=[1],
    feature_cache=False,
    teacher_top_k=0,
    hbm=Hbm(arguments=2 << 30, temporaries=3 << 29, free=12 << 30),
    executed_flops=3.26e15,
    flops={"student": 1.5e15, "teacher": 1e15, "attention": 7e12, "vision": 3e12},
    received={"weights": 37 << 30},
    seconds={"compute": 0.258, "memory": 0.02, "interconnect": 0.19},
    mfu=0.771,
    steps=520,
    compile_seconds=68.0,
)

METRICS = {
    "docs": MetricInfo(name="anls", **Metric("anls", None).describe()),
    "mme": MetricInfo(name="mme_p", **Metric("perception", None, full=2000.0, unit="").describe()),
    "wiki": MetricInfo(name="bpb", **Metric("bits", None, full=None, unit="bit", higher_is_better=False).describe()),
}


def found(anls, perception, bits):
    """Evaluations of one model, by set."""
    values = {"docs": {"anls": anls}, "mme": {"perception": perception, "OCR": 50.0}, "wiki": {"bits": bits}}
    counts = {"docs": ("questions", 40), "mme": ("questions", 30), "wiki": ("tokens", 2000)}
    groups = {"mme": {"OCR": Group(questions=2, values={"perception": 50.0, "OCR": 50.0})}}
    return {
        name: Evaluated(
            metric=metric, values=values[name], groups=groups.get(name, {}), counted=counts[name][0],
            count=counts[name][1], parameters=SIZE, seconds=1.5,
        )
        for name, metric in METRICS.items()
    }  # fmt: skip


def write_several(workdir):
    """The same models on several sets."""
    result, teacher = read_result(workdir), found(0.8, 1500.0, 1.0)
    models = [found(0.4, 1200.0, 2.0), found(0.6, 1350.0, 1.25), found(0.2, 1500.0, 1e9)]
    runs = [replace(run, evaluation=compare(model, teacher)) for run, model in zip(result.runs, models, strict=True)]
    write_artefact(workdir / "result.json", result_of(teacher, runs, "depth-sft", export=EXPORT))


def change(workdir, run, **changes):
    """Replace fields of a run of the result, by its number."""
    result = read_result(workdir)
    result.runs[run] = replace(result.runs[run], **changes)
    write_artefact(workdir / "result.json", result)


_SAME = compare({"questions": evaluated(0.8)}, {"questions": evaluated(0.8)})
RUNS = [
    Run(**{**FACTS, "name": name, "plan": plan, "recovery": recovery}, evaluation=_SAME)
    for name, plan, recovery in (
        ("depth", "d", "none"),
        ("depth-sft", "d", "sft"),
        ("width", "w", "none"),
        ("width-reconstructed", "w", "reconstructed"),
    )
]


def write_records(folder):
    """40 questions about 20 images, the last of which is damaged; the answers are yes and no."""
    for number in range(19):
        Image.new("RGB", (400, 100), (number * 10, 0, 0)).save(folder / f"{number}.png")
    (folder / "19.png").write_text("no image")
    return [
        Record(
            f"r{place}",
            (("human", f"<image>\nIs <b>{place} red?"), ("gpt", "yes" if place % 4 else "no")),
            (folder / f"{place // 2}.png",),
        )
        for place in range(40)
    ]


def answered(right):
    """(said, scores) of models that are right on these questions."""
    scores = {name: [float(place in mine) for place in range(40)] for name, mine in right.items()}
    return {name: ["yes" if one else "" for one in of] for name, of in scores.items()}, scores
