"""Tasks of lmms-eval from the command line: sets like any other, kept, compared, and refused in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hf_cases import copy_llava
from repository import ROOT

from vlmprune_jax.run.cli.main import main

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install -e '.[eval]'")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config


def get_config():
    config = experiment_config()
    config.model.hf_dir = "{root}/teacher"
    config.data.eval = "{root}/data/test.json"
    config.data.images = "{root}/data/images"
    config.data.system = ""
    config.evaluate.batch_size = 4
    config.evaluate.max_new_tokens = 4
    config.evaluate.tasks_path = "{tasks}"
    config.evaluate.tasks_data = "{root}/data"
    return config
"""
# Two values of one task that count, and what MME's own aggregation needs of each question.
PAIRS = """

def process_results(doc, results):
    number = int(doc["id"][1:])
    category = ("existence", "code_reasoning")[number // 4]
    key = "mme_perception_score" if category == "existence" else "mme_cognition_score"
    entry = {"question_id": str(number // 2), "category": category, "score": float(results[0] != "")}
    return {key: entry}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    root = tmp_path_factory.mktemp("tasks")
    copy_llava(goldens, root / "teacher")
    images = root / "data/images"
    images.mkdir(parents=True)
    for number in range(4):
        shutil.copy(goldens / f"data/images/img{number}.png", images)
    turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": f"r{i}", "image": f"img{i % 4}.png", "conversations": turns} for i in range(8)]
    (root / "data/test.json").write_text(json.dumps(records))
    shutil.copytree(ROOT / "configs/lmms", root / "lmms")
    task = (root / "lmms/easyvqa.yaml").read_text()
    (root / "lmms/pairs_task.py").write_text((root / "lmms/easyvqa_task.py").read_text() + PAIRS)
    pairs = task.replace("easyvqa_task.", "pairs_task.").replace("task: easyvqa", "task: pairs")
    listed = "\n".join(
        f"  - metric: {name}\n    aggregation: !function {{mme}}.mme_aggregate_results\n    higher_is_better: true"
        for name in ("mme_perception_score", "mme_cognition_score")
    )
    (root / "lmms/mme_utils.py").write_text("from lmms_eval.tasks.mme.utils import mme_aggregate_results\n")
    pairs = (
        pairs[: pairs.index("metric_list:")] + "process_results: !function pairs_task.process_results\nmetric_list:\n"
    )
    (root / "lmms/pairs.yaml").write_text(pairs + listed.format(mme="mme_utils") + "\n")
    (root / "lmms/broken.yaml").write_text(
        task.replace("task: easyvqa", "task: broken").replace("to_target", "to_nothing")
    )
    (root / "config.py").write_text(CONFIG.format(root=root, tasks=root / "lmms"))
    return root


@pytest.fixture
def evaluate(root, tmp_path, capsys, monkeypatch):
    """Callable (*flags) -> (exit code, lines that were printed)."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def command(*flags):
        capsys.readouterr()
        code = main(["evaluate", f"--config={root / 'config.py'}", f"--workdir={tmp_path / 'w'}", *flags])
        shown = capsys.readouterr()
        return code, (shown.out + shown.err).splitlines()

    command.folder = tmp_path / "w/eval"
    return command


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def answers(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.answers.jsonl").read_text().splitlines()]


def test_a_task_is_a_set_whose_answers_are_our_own(evaluate, root, goldens):
    copy_llava(goldens, evaluate.folder.parent / "pruned")
    code, lines = evaluate("--tasks=easyvqa,pairs")
    assert code == 0, lines
    task, own = answers(evaluate.folder, "teacher.easyvqa"), answers(evaluate.folder, "teacher")
    assert [line["prediction"] for line in task] == [line["prediction"] for line in own]
    assert any(line["prediction"] for line in own)
    assert [(line["id"], line["references"]) for line in task] == [(str(i), ["yes"]) for i in range(8)]
    found = read(evaluate.folder, "pruned.easyvqa")
    assert found["metric"]["main"] == "exact_match"
    assert found["values"] == {"exact_match": sum(found["scores"]["exact_match"]) / 8}
    perception = read(evaluate.folder, "pruned.pairs_mme_perception_score")
    assert (perception["metric"]["full"], perception["values"]["mme_perception_score"]) == (2000.0, 200.0)
    assert perception["retained_interval"][0] < 100 < perception["retained_interval"][1]
    assert read(evaluate.folder, "teacher.pairs_mme_cognition_score")["metric"]["full"] == 800.0

    code, lines = evaluate("--tasks=easyvqa,pairs")
    assert code == 0, lines
    assert "evaluate teacher easyvqa: unchanged, skipped (eval/teacher.easyvqa.answers.jsonl is up to date)" in lines


def test_result_json_gains_the_tasks(evaluate, goldens):
    from report_cases import EXPORT, FACTS, evaluated, result_of

    from vlmprune_jax.run.workdir.artefact import write_artefact
    from vlmprune_jax.run.workdir.comparison import compare
    from vlmprune_jax.run.workdir.result import Run, read_result

    workdir = evaluate.folder.parent
    copy_llava(goldens, workdir / "pruned")
    teacher = {"questions": evaluated(0.5, {}, count=8, parameters=1)}
    run = Run(**{**FACTS, "name": "depth", "scores": []}, evaluation=compare(teacher, teacher))
    write_artefact(workdir / "result.json", result_of(teacher, [run], export=EXPORT))
    code, lines = evaluate("--tasks=pairs")
    assert code == 0, lines
    result = read_result(workdir)
    assert list(result.sets) == ["questions", "pairs_mme_perception_score", "pairs_mme_cognition_score"]
    evaluation = result.runs[0].evaluation
    assert evaluation.retained["pairs_mme_cognition_score"] == 100.0
    assert evaluation.paper_average == pytest.approx(100.0)
    assert result.runs[0].plan == "plan.json"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks=easyvq",), "lmms-eval has no task 'easyvq'; did you mean 'easyvqa'?"),
        (("--tasks=pope",), "data/POPE does not exist: save the data set there (docs/how-to/benchmarks.md)"),
        (("--tasks=pope", "--config.evaluate.tasks_data=None"), "evaluate.tasks_data, which is not set"),
        (("--tasks=easyvqa,easyvqa",), "evaluate.tasks: 'easyvqa' is listed twice"),
        (("--tasks=a/b",), "the name 'a/b' is used as a file name"),
        (("--tasks=easyvqa", "--config.evaluate.tasks_path=/no/such"), "evaluate.tasks_path=/no/such: no such folder"),
        (("--tasks=broken",), "task broken: lmms-eval fails with"),
        (("--tasks=pairs", "--config.evaluate.questions=3"), "task pairs: lmms-eval fails with AssertionError"),
    ],
)
def test_what_is_refused(evaluate, flags, message):
    code, lines = evaluate("--config.evaluate.text_window=9", *flags)
    assert code == 2, lines
    assert message in lines[-1]
    assert lines[-1].startswith("vlmprune: error: ")
    left = os.listdir(evaluate.folder) if evaluate.folder.exists() else []
    assert not [name for name in left if "easyvq" in name or "broken" in name or name.endswith("pairs.answers.jsonl")]


def test_another_model_at_the_same_path_is_asked_again(evaluate, root, tmp_path, goldens):
    copy_llava(goldens, evaluate.folder.parent / "pruned")
    assert evaluate("--tasks=easyvqa")[0] == 0
    from hf_cases import edit_weights

    def negated(tensors):
        name = next(name for name in tensors if name.endswith("lm_head.weight"))
        tensors[name] = -tensors[name]

    before = answers(evaluate.folder, "pruned.easyvqa")
    edit_weights(evaluate.folder.parent / "pruned", negated, "model-00001-of-00002.safetensors")
    code, lines = evaluate("--tasks=easyvqa")
    assert code == 2
    assert "model changed" in lines[-1]
    assert evaluate("--tasks=easyvqa", "--overwrite")[0] == 0
    after = answers(evaluate.folder, "pruned.easyvqa")
    assert [line["prediction"] for line in after] != [line["prediction"] for line in before]


# --- the nine benchmarks, on a few rows with their columns ------------------------------------------------------------

LETTERS, YES = ["A", "B", "B", "A"], ["yes", "no", "no", "yes"]
BENCHMARKS = {
    "MMMU": ("validation", {
        "id": [f"validation_Art_{i}" for i in range(4)], "question": ["What is <image 1>?"] * 4, "answer": LETTERS,
        "options": ["['red', 'blue']"] * 4, "question_type": ["multiple-choice"] * 4,
        **{f"image_{i}": [None] * 4 for i in range(2, 8)},
    }),
    "ScienceQA-IMG": ("test", {"question": ["Which?"] * 4, "hint": ["", "See."] * 2, "choices": [["x", "y"]] * 4,
                               "answer": [0, 1, 1, 0]}),
    "AI2D": ("test", {"question": ["Which?"] * 4, "options": [["x", "y"]] * 4, "answer": ["0", "1", "1", "0"]}),
    "MME": ("test", {"question_id": ["1", "1", "2", "2"], "question": ["A dog? Please answer yes or no."] * 4,
                     "answer": ["Yes", "No"] * 2, "category": ["count", "count", "code_reasoning", "code_reasoning"]}),
    "POPE": ("test", {"question_id": ["1", "2", "3", "4"], "question": ["A dog?"] * 4, "answer": YES,
                      "category": ["random"] * 4}),
    "DocVQA": ("validation", {"question": ["Who?"] * 4, "answers": [["Ann", "ann b"]] * 4}),
    "GQA": ("testdev", {"id": list("1234"), "imageId": list("1234"), "question": ["A dog?"] * 4, "answer": YES}),
    "MathVista": ("testmini", {
        "pid": list("1234"), "question": ["How many?"] * 4, "query": ["How many?"] * 4, "choices": [None] * 4,
        "unit": [None] * 4, "precision": [None] * 4, "question_type": ["free_form"] * 4, "answer": list("1234"),
        "answer_type": ["integer"] * 4, "metadata": [{"split": "testmini"}] * 4,
    }),
}  # fmt: skip
VALUES = {
    "mmmu_val": "mmmu_acc", "scienceqa_img": "exact_match", "ai2d": "exact_match", "mme_perception":
    "mme_perception_score", "mme_cognition": "mme_cognition_score", "pope": "pope_f1_score", "pope_adv":
    "pope_f1_score", "pope_pop": "pope_f1_score", "pope_random": "pope_f1_score", "docvqa_val": "anls", "gqa":
    "exact_match",
}  # fmt: skip


@pytest.mark.slow
def test_the_task_files_of_the_nine_benchmarks(evaluate, goldens, tmp_path, monkeypatch):
    """Each finds its data, its questions are asked, and what the questions scored makes up the value."""
    import datasets
    from PIL import Image

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("API_TYPE", raising=False)
    # MathVista asks for its judge on import, which an earlier test may have done in its own way.
    for name in [name for name in sys.modules if name.startswith("lmms_eval.tasks.mathvista")]:
        monkeypatch.delitem(sys.modules, name)
    pictures = [Image.open(goldens / f"data/images/img{i}.png").convert("RGB") for i in range(4)]
    names = {"MMMU": "image_1", "MathVista": "decoded_image"}
    for name, (split, columns) in BENCHMARKS.items():
        rows = datasets.Dataset.from_dict({**columns, names.get(name, "image"): pictures})
        for empty in [column for column in columns if column.startswith("image_")]:
            rows = rows.cast_column(empty, datasets.Image())
        datasets.DatasetDict({split: rows}).save_to_disk(tmp_path / "data" / name)
        if name == "POPE":
            kinds = dict.fromkeys(("adversarial", "popular", "random"), rows)
            datasets.DatasetDict(kinds).save_to_disk(tmp_path / "data/POPE-Full")
    copy_llava(goldens, evaluate.folder.parent / "pruned")
    data = f"--config.evaluate.tasks_data={tmp_path}/data"
    tasks = dict.fromkeys(name.removesuffix("_perception").removesuffix("_cognition") for name in VALUES)
    code, lines = evaluate(f"--tasks={','.join(tasks)}", data)
    assert code == 0, lines
    for name, value in VALUES.items():
        found = read(evaluate.folder, f"pruned.{name}")
        assert found["metric"]["main"] == value
        assert found["values"][value] is not None
        assert "retained_interval" in found, f"{name}: its questions' scores do not make up its value"
        assert len(next(iter(found["scores"].values()))) == (2 if name.startswith("mme") else 4)
    code, lines = evaluate("--tasks=mathvista_testmini_format", data)
    assert code == 2
    assert "task mathvista_testmini_format: lmms-eval fails with OpenAIError" in lines[-1]


# --- the same answers in three ways -----------------------------------------------------------------------------------

QUESTIONS = 160


def by_command(folder, name, arguments, tasks, out):
    """{question: answer} of `python -m lmms_eval`."""
    command = [sys.executable, "-m", "lmms_eval", "--model", name, "--model_args", f"pretrained={folder},{arguments}"]
    command += ["--tasks", "easyvqa", "--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    command += ["--limit", str(QUESTIONS), "--batch_size", "1" if name == "llava_hf" else "32"]
    command += ["--device", "cpu"] if name == "llava_hf" else []
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(out / "hf"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    (file,) = [*out.rglob("*_samples_easyvqa.jsonl")] or [None]
    assert file is not None, done.stdout[-3000:] + done.stderr[-3000:]
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        sample["doc_id"]: sample["filtered_resps"][0]
        if isinstance(sample["filtered_resps"], list)
        else sample["filtered_resps"]
        for sample in samples
    }


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_same_answers_in_three_ways(tmp_path, capsys):
    """easy-VQA, the bundled teacher and an export of it that lost four layers: `python -m lmms_eval` with our model and
    with lmms-eval's own, and `vlmprune evaluate` with records and as a task.
    """
    pytest.importorskip("decord", reason="lmms-eval's llava_hf imports decord: pip install decord")
    from hf_cases import keep_layers

    import vlmprune_jax as vp
    from vlmprune_jax.run.demo.easyvqa import write_dataset
    from vlmprune_jax.run.evaluation.lmms.tasks import write_tasks

    teacher, workdir = Path(vp.__file__).parent / "demo/teacher", tmp_path / "w"
    pruned, plan = keep_layers(vp.load(teacher), [0, 1, 3, 5, 8, 9])
    vp.save(pruned, workdir / "pruned", source_dir=teacher, dtype="float32", plan=plan)
    write_dataset(workdir / "data")
    (tmp_path / "tasks").mkdir()
    write_tasks(ROOT / "configs/lmms", workdir / "data", tmp_path / "tasks")
    flags = [f"--config.evaluate.questions={QUESTIONS}", f"--config.evaluate.tasks_path={ROOT}/configs/lmms"]
    flags += [
        f"--config.evaluate.tasks_data={workdir}/data",
        "--config.prune_variants={}",
        "--config.recover_variants={}",
    ]
    code = main(["evaluate", f"--config={ROOT}/configs/demo.py", f"--workdir={workdir}", "--tasks=easyvqa", *flags])
    assert code == 0, capsys.readouterr()
    for name in ("teacher", "pruned"):
        own = [line["prediction"] for line in answers(workdir / "eval", name)]
        assert [line["prediction"] for line in answers(workdir / "eval", f"{name}.easyvqa")] == own
    assert 0.5 < read(workdir / "eval", "pruned.easyvqa")["values"]["exact_match"] < 0.98  # wrong answers among them
    for model, arguments in (("vlmprune_jax", "system=,aspect_ratio=square"), ("llava_hf", "device_map=cpu")):
        found = by_command(workdir / "pruned", model, arguments, tmp_path / "tasks", tmp_path / model)
        assert [found[place] for place in range(QUESTIONS)] == own, model
