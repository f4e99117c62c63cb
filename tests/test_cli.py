"""The commands as a person meets them: help, typos, exit codes, what is skipped, refused, resumed and written."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlmprune_jax.cli.config import experiment_config
from vlmprune_jax.cli.main import COMMANDS, main
from vlmprune_jax.errors import UserError
from vlmprune_jax.stages import ledger
from vlmprune_jax.stages.ledger import Stage, run_stage
from vlmprune_jax.stages.single import plan_options, recover_config
from vlmprune_jax.stages.spec import Experiment, PruneSpec, RecoverSpec, override

ROOT = Path(__file__).parents[1]


def failing(capsys, *argv):
    """The one line that a command prints when it exits with code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vlmprune: error: ")
    assert err.count("\n") == 1, err
    return out + err


# --- help and typos --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_overview(capsys, argv):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"vlmprune {name}")
    assert "--debug" in out
    assert "HF_DIR" in out if name == "inspect" else "--workdir" in out


def test_module_runs_and_help_does_not_load_jax():
    code = "import sys; from vlmprune_jax.cli.main import main; main(['run', '--help']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"
    done = subprocess.run([sys.executable, "-m", "vlmprune_jax", "rnu"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "vlmprune: error: no command 'rnu'; did you mean 'run'?\n")


CONFIG = """
from vlmprune_jax.cli.config import experiment_config

def get_config(variant="none"):
    config = experiment_config()
    config.prune.ratio = {"none": 0.3, "half": 0.5}[variant]
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdri=x"], "vlmprune run has no flag --workdri; did you mean 'workdir'?"),
        (["--config={file}", "--config.prune.ratoi=0.2"], "config.prune has no 'ratoi'; did you mean 'ratio'?"),
        (["--config={file}", "--config.prnue.ratio=0.2"], "config has no 'prnue'; did you mean 'prune'?"),
        (["--config={file}", "--config.prune.ratio=much"], "could not convert string to float"),
        (["--config={file}", "--config.prune.ratio.x=1"], "config.prune.ratio is a value, not a section"),
        (["--config.prune.ratio=0.2"], "give the file as well, --config=FILE.py"),
        (["--config=nowhere.py"], "--config=nowhere.py: cannot be loaded"),
        (["--config={file}:third"], "cannot be loaded ('third')"),
        ([], "no experiment given: --config=FILE.py"),
        (["--config={file}"], "no workdir given: --workdir=DIR"),
        (["--config={file}", "--workdir={file}"], "is a file, give a folder"),
        (["--config={file}", "--workdir={dir}/w"], "model.hf_dir is not set"),
        (["--config={file}", "--workdir={dir}/w", "--config.model.hf_dir=/no/where"], "/no/where: no such folder"),
        (["--config={file}", "--workdir={dir}/w", "--config.data.source=web"], "data.source='web' is not one of"),
        (["--config={file}", "--workdir={dir}/w", "--config.model.hf_dir={dir}"], "data.eval is not set"),
    ],
)
def test_wrong_command_lines(capsys, config_file, flags, message):
    filled = [flag.format(file=config_file, dir=config_file.parent) for flag in flags]
    assert message in failing(capsys, "run", *filled)
    assert not (config_file.parent / "w").exists()


def test_debug_shows_where(capsys):
    assert main(["inspect", "/no/where", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("vlmprune: error: /no/where: no such folder")


def test_interrupt(capsys, monkeypatch):
    def stop(flags):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmprune_jax.cli.inspect.run", stop)
    assert main(["inspect", "x"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_inspect(capsys, goldens):
    assert main(["inspect", str(goldens / "ckpt/llava_hf"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["layout"], found["text"]["layers"]) == ("llava", "transformers", 6)
    parts = found["parameters"]
    assert parts["total"] == parts["text"] + parts["vision"] + parts["projector"]
    assert found["prunable"]["most_by_depth"] == pytest.approx(5 * found["prunable"]["layer"])
    assert main(["inspect", str(goldens / "ckpt/llama_gqa")]) == 0
    out = capsys.readouterr().out
    assert "3 x (6/2 heads, 64 neurons)" in out
    assert max(map(len, out.splitlines())) <= 120
    assert "takes one folder" in failing(capsys, "inspect")
    assert "is not supported" in failing(capsys, "inspect", str(goldens / "ckpt/bunny"))


# --- experiments -----------------------------------------------------------------------------------------------------


def test_config_holds_every_setting_and_comes_back():
    assert override(Experiment(), experiment_config().to_dict()) == Experiment()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_shipped_configs_are_experiments(file):
    text = file.read_text()
    assert "vlmprune " in text.split('"""')[1]  # the docstring has the command
    if file.name == "easyvqa_pretrain.py":
        return
    space: dict = {}
    exec(compile(text, str(file), "exec"), space)
    experiment = override(Experiment(), space["get_config"]().to_dict())
    plan_options(experiment.prune)
    for values in list(experiment.recover_variants.values()) or [{}]:
        recover_config(override(experiment, values).recover)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune": {"ratoi": 1}}, "config.prune has no 'ratoi'; did you mean 'ratio'?"),
        ({"prune": 3}, "config.prune is a section"),
        ({"prune": {"ratio": "a"}}, "config.prune.ratio is 'a', expected float or nothing"),
        ({"recover": {"lora": {"rank": 2.5}}}, "config.recover.lora.rank is 2.5, expected int"),
        ({"recover": {"lora": {"targets": "q_proj"}}}, "config.recover.lora.targets is 'q_proj'"),
        ({"score": {"reference_compat": 1}}, "expected bool"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(UserError) as error:
        override(Experiment(), values)
    assert message in str(error.value)


def test_settings_reach_the_library():
    spec = override(RecoverSpec(), {"steps": 7, "losses": {"l2": 0.5, "l2_layers": [-1, 2]}, "learning_rate": 1})
    built = recover_config(spec)
    assert (built.steps, built.epochs, built.losses.l2_layers, built.lora.rank) == (7, None, (-1, 2), 128)
    assert recover_config(dataclasses.replace(spec, trainable="projector")).lora is None
    assert plan_options(PruneSpec(ratio=0.3)) == {}
    assert plan_options(PruneSpec(attn_layers=(1, 4), rounding="at_least")) == {
        "attn_layers": [1, 4],
        "rounding": "at_least",
    }


# --- the ledger ------------------------------------------------------------------------------------------------------


class Work:
    """A stage that writes one file, and what happened."""

    def __init__(self, folder):
        self.folder, self.runs, self.said, self.fail = folder, 0, [], False
        (folder / "in.txt").write_text("input")

    def __call__(self, overwrite=False, scratch=(), version=1, **settings):
        stage = Stage(
            name="depth/prune",
            version=version,
            workdir=self.folder,
            settings={"ratio": 0.3, **settings},
            inputs={"data.train": self.folder / "in.txt"},
            outputs=[self.folder / "out.txt"],
            scratch=scratch,
        )
        return run_stage(stage, self.body, overwrite=overwrite, say=self.said.append)

    def body(self):
        self.runs += 1
        if self.fail:
            raise KeyboardInterrupt
        ledger.write_text(self.folder / "out.txt", f"run {self.runs}")
        return {"number": self.runs}


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_unchanged_stage_is_skipped(work):
    first = work()
    assert first["number"] == 1
    assert work() == first
    assert work.runs == 1
    assert work.said == ["depth/prune: unchanged, skipped (out.txt is up to date)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda work: {"ratio": 0.4}, "was made from other inputs (ratio was 0.3, now 0.4)"),
        (lambda work: {"version": 2}, "was made from other inputs (version was 1, now 2)"),
        (lambda work: (work.folder / "in.txt").write_text("other") and {}, "other inputs (data.train changed)"),
        (lambda work: (work.folder / "out.txt").write_text("mine") and {}, "was changed since this stage made it"),
    ],
)
def test_other_inputs_are_refused_unless_overwritten(work, change, message):
    work()
    settings = change(work)
    with pytest.raises(UserError) as error:
        work(**settings)
    assert message in str(error.value)
    assert "use --overwrite to replace it, or another --workdir" in str(error.value)
    assert work.runs == 1
    assert work(overwrite=True, **settings)["number"] == 2
    assert work(**settings)["number"] == 2


def test_output_of_unknown_origin_is_refused(work):
    (work.folder / "out.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out.txt exists and was not made by this stage: use --overwrite"):
        work()
    assert (work.folder / "out.txt").read_text() == "mine"


def test_interrupted_stage_starts_again(work):
    work.fail = True
    with pytest.raises(KeyboardInterrupt):
        work()
    assert sorted(p.name for p in work.folder.iterdir()) == [".stages", "in.txt"]
    work.fail = False
    assert work(ratio=0.5)["number"] == 2  # nothing was left that other settings could clash with


def test_scratch_is_kept_for_the_same_inputs_only(work):
    scratch = work.folder / "checkpoints"
    scratch.mkdir()
    with pytest.raises(UserError, match="checkpoints exists and was not made by this stage"):
        work(scratch=[scratch])
    scratch.rmdir()

    def stopped():
        scratch.mkdir()
        raise KeyboardInterrupt

    body, work.body = work.body, stopped
    with pytest.raises(KeyboardInterrupt):
        work(scratch=[scratch])
    work.body = body
    with pytest.raises(UserError, match=r"checkpoints was made from other inputs \(ratio was 0.3, now 0.4\)"):
        work(scratch=[scratch], ratio=0.4)
    seen = []
    work.body = lambda: seen.append(scratch.exists()) or body()
    work(scratch=[scratch])
    assert seen == [True]
    assert not scratch.exists()  # the result is there: its checkpoints are no longer needed


def test_digest_sees_content_names_and_sampled_blocks(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    big = folder / "weights"
    big.write_bytes(b"a" * (ledger._WHOLE + 10))
    (folder / "config.json").write_text("{}")
    first = ledger.digest(folder)
    (folder / ".hidden").write_text("x")
    assert ledger.digest(folder) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert ledger.digest(tmp_path / "copy") == first
    with big.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"b")
    assert ledger.digest(folder) != first
    (tmp_path / "copy" / "config.json").rename(tmp_path / "copy" / "other.json")
    assert ledger.digest(tmp_path / "copy") != first
    with pytest.raises(UserError, match="no such file or folder"):
        ledger.digest(tmp_path / "none")


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a" / "x.json"
    ledger.write_json(path, {"a": (1, 2)})
    assert ledger.read_json(path) == {"a": [1, 2]}

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(ledger.os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        ledger.write_json(path, {"a": 3})
    assert ledger.read_json(path) == {"a": [1, 2]}
    with pytest.raises(UserError, match="no such file"):
        ledger.read_json(tmp_path / "none.json")


# --- the whole run, on the golden LLaVA ------------------------------------------------------------------------------

GRID = """
from vlmprune_jax.cli.config import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{root}/teacher"
    config.data.train = config.data.eval = "{root}/records.json"
    config.data.images = "{images}"
    config.data.system = ""
    config.data.fraction = 0.5
    config.score.samples = 4
    config.score.batch_size = 2
    config.prune.ratio = 0.2
    config.evaluate.batch_size = 4
    config.evaluate.max_new_tokens = 2
    config.export.dtype = "float32"
    config.recover.trainable = "projector"
    config.recover.batch_size = 2
    config.recover.steps = 4
    config.recover.save_every = 1
    config.recover.log_every = 1
    config.recover.losses = {{"ce": 0.5, "l2": 0.5}}
    config.prune_variants = {{"depth": {{"prune": {{"method": "depth"}}}}, "width": {{"prune": {{"method": "width"}}}}}}
    config.recover_variants = {{"sft_l2": {{}}}}
    return config
"""


@pytest.fixture
def experiment(tmp_path, goldens):
    teacher = tmp_path / "teacher"
    shutil.copytree(goldens / "ckpt/llava_hf", teacher)
    shutil.copytree(goldens / "tokenizers/llava", teacher, dirs_exist_ok=True)
    shutil.copy(goldens / "ckpt/clip_tower/preprocessor_config.json", teacher)
    records = [
        {
            "id": f"r{i}",
            "image": f"img{i % 4}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nIs {'a dog' if i % 2 else 'one'} here?"},
                {"from": "gpt", "value": "yes" if i % 3 else "no"},
            ],
        }
        for i in range(10)
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    file = tmp_path / "grid.py"
    file.write_text(GRID.format(root=tmp_path, images=goldens / "data/images"))
    return [f"--config={file}", f"--workdir={tmp_path / 'w'}"]


@pytest.mark.slow
def test_whole_run(capsys, monkeypatch, tmp_path, experiment):
    from vlmprune_jax.hf.read import load
    from vlmprune_jax.models.vlm import forward
    from vlmprune_jax.recover.metrics import Recorder

    workdir = tmp_path / "w"
    record = Recorder.step

    def killed(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        record(self, step, *args)

    monkeypatch.setattr(Recorder, "step", killed)
    assert main(["run", *experiment]) == 130
    assert not (workdir / "depth/sft_l2/recovered").exists()
    assert not (workdir / "result.json").exists()
    monkeypatch.undo()
    assert main(["run", *experiment]) == 0
    out = capsys.readouterr().out
    assert "depth/prune: unchanged, skipped" in out
    assert "Loading weights" not in out
    facts = json.loads((workdir / ".stages/depth.sft_l2.recover.json").read_text())["facts"]
    assert facts["resumed_from"] == 2
    assert facts["steps"] == 4

    result = json.loads((workdir / "result.json").read_text())
    assert result["teacher"]["questions"] == 10
    assert [run["name"] for run in result["runs"]] == ["depth", "depth-sft_l2", "width", "width-sft_l2"]
    wanted = ("name", "method", "ratio_asked", "ratio_reached", "parameters", "recovery", "data_fraction", "accuracy")
    for run in result["runs"]:
        assert {*wanted, "retained", "seconds", "path"} <= set(run)
        assert sum(x.size for x in tree_leaves(load(workdir / run["path"]).params)) == run["parameters"]
        assert run["ratio_reached"] == pytest.approx(1 - run["parameters"] / result["teacher"]["parameters"])
    assert [run["recovery"] for run in result["runs"]] == ["none", "sft_l2"] * 2
    assert [run["data_fraction"] for run in result["runs"]] == [0.0, 0.5] * 2
    assert result["export"]["max_abs_logit_difference"] <= 1e-4
    best = next(run for run in result["runs"] if run["name"] == result["best"])
    ids = np.array([[1, 5, 9, 12]])
    exported, chosen = (np.asarray(forward(load(f), ids)[0]) for f in (workdir / "export", workdir / best["path"]))
    np.testing.assert_array_equal(exported, chosen)
    answers = [json.loads(line) for line in (workdir / "eval/teacher.answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [f"r{i}" for i in range(10)]
    assert (workdir / "report.html").is_file()

    # Again: nothing is done. With other settings: refused, and nothing is touched.
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("model.safetensors")}
    assert main(["run", *experiment]) == 0
    out = capsys.readouterr().out
    assert out.count("unchanged, skipped") == 12
    assert "..." not in out
    line = failing(capsys, "run", *experiment, "--config.prune.ratio=0.25")
    assert "depth/prune: " in line
    assert "(prune.ratio was 0.2, now 0.25): use --overwrite" in line
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("model.safetensors")} == before


def tree_leaves(params):
    import jax

    return jax.tree.leaves(params)


# --- what is printed -------------------------------------------------------------------------------------------------


def reporter(width, terminal):
    from rich.console import Console

    from vlmprune_jax.stages.console import Reporter

    return Reporter(Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None))


def test_bars_only_on_a_terminal():
    for terminal in (True, False):
        shown = reporter(80, terminal)
        with shown.bar("evaluate teacher", 4) as progress:
            progress(2)
        text = shown.console.file.getvalue()
        assert ("evaluate teacher" in text) is terminal
        assert terminal or not text


def test_lines_are_neither_wrapped_nor_markup():
    shown = reporter(20, False)
    shown.say("[bold] a line of more than twenty columns")
    assert shown.console.file.getvalue() == "[bold] a line of more than twenty columns\n"
    quiet = dataclasses.replace(shown, enabled=False)
    quiet.say("x")
    quiet.table("t", ["a"], [["b"]])
    with quiet.bar("x", 1) as progress:
        progress(1)
    assert "x" not in shown.console.file.getvalue()


def test_the_demo_table_fits_80_columns():
    from vlmprune_jax.report.build import table_of

    run = {"ratio_asked": 0.2, "ratio_reached": 0.2003, "parameters": 1326624, "accuracy": 0.9871, "retained": 100.0}
    runs = [
        {**run, "name": name, "recovery": recovery, "data_fraction": 0.05, "seconds": 136.5}
        for name, recovery in (("depth", "none"), ("depth-sft_l2", "sft_l2"))
    ]
    shown = reporter(80, False)
    shown.table("title", *table_of({"teacher": {"parameters": 1658976, "accuracy": 0.9871}, "runs": runs}))
    text = shown.console.file.getvalue()
    assert "depth-sft_l2" in text
    assert "1,326,624" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
