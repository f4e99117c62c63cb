"""The commands as a person meets them: help, typos, exit codes, what is skipped, refused, resumed and written."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlmprune_jax.cli.config import experiment_config, to_experiment
from vlmprune_jax.cli.main import COMMANDS, main
from vlmprune_jax.errors import UserError
from vlmprune_jax.stages import ledger
from vlmprune_jax.stages.ledger import Stage, run_stage
from vlmprune_jax.stages.recipes import RECIPES
from vlmprune_jax.stages.settings import plan_options, recover_config
from vlmprune_jax.stages.spec import Experiment, PruneSpec, RecoverSpec, override

ROOT = Path(__file__).parents[1]


def failing(capsys, *argv):
    """The one line that a command prints when it exits with code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vlmprune: error: ")
    assert err.count("\n") == 1, err
    return out + err


def test_hub_ids_become_folders(monkeypatch, tmp_path):
    monkeypatch.setattr("vlmprune_jax.hf.read.resolve", lambda name: tmp_path / name)
    config = experiment_config()
    config.model.hf_dir, config.model.vision_dir = "org/model", "org/tower"
    model = to_experiment(config, str(tmp_path / "w"))[0].model
    assert (model.hf_dir, model.vision_dir) == (str(tmp_path / "org/model"), str(tmp_path / "org/tower"))
    config = experiment_config()
    assert to_experiment(config, str(tmp_path / "w"))[0].model == Experiment().model


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
    assert {"inspect": "HF_DIR", "tfds": "--out"}.get(name, "--workdir") in out


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
    config.prune = {"ratio": {"none": 0.3, "half": 0.5}[variant]}
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
    assert "pass the tower's own folder as vision_dir" in failing(capsys, "inspect", str(goldens / "ckpt/bunny"))


# --- experiments -----------------------------------------------------------------------------------------------------


def test_config_holds_every_setting_and_comes_back():
    assert override(Experiment(), experiment_config().to_dict()) == Experiment()


def test_a_dictionary_changes_a_section_of_a_config():
    """At any depth, as a ConfigDict too; other settings stay, variants are no section, and a typo is refused."""
    config = experiment_config(recipe="llava")
    config.recover.losses = {"kl": 0.5}
    config.recover = {"lora": {"rank": 4}, "epochs": 2}
    config["mesh"] = {"fsdp": 8}
    config.data = experiment_config().data
    changes = {"recover": {"losses": {"kl": 0.5}, "lora": {"rank": 4}, "epochs": 2.0}, "mesh": {"fsdp": 8}}
    expected = override(override(Experiment(), {"recover": RECIPES["llava"]["recover"]}), changes)
    assert override(Experiment(), config.lock().to_dict()) == expected
    for name in ("one", "two"):
        config.recover_variants = {name: {"recover": {"epochs": 1.0}}}
    assert config.recover_variants.to_dict() == {"two": {"recover": {"epochs": 1.0}}}
    config = experiment_config()
    config.recover.losses = {"kll": 0.5}
    with pytest.raises(UserError, match=r"config.recover.losses has no 'kll'; did you mean 'kl'"):
        override(Experiment(), config.to_dict())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_where_a_config_starts(name):
    """Every setting is written out, so that it is recorded, and what is set afterwards wins."""
    config = experiment_config(recipe=name)
    config.recover.learning_rate = 3e-3
    experiment = override(Experiment(), config.to_dict())
    assert experiment == override(override(Experiment(), RECIPES[name]), {"recover": {"learning_rate": 3e-3}})
    built = recover_config(experiment.recover)
    assert built.learning_rate == 3e-3
    facts = (built.lora.rank, built.lora.alpha, built.weight_decay, built.projector_learning_rate)
    assert facts == ((16, 32.0, 0.05, None) if name == "internvl" else (128, 256.0, 0.0, 2e-5))
    assert built.losses.teacher_inputs == ("own" if name == "internvl" else "student")
    assert (built.schedule, built.warmup_ratio, built.epochs, built.batch_size) == ("cosine", 0.03, 1.0, 128)
    with pytest.raises(UserError, match=f"no recipe '{name}x'; did you mean '{name}'"):
        experiment_config(recipe=f"{name}x")


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
    cached = override(RecoverSpec(), {"steps": 7, "losses": {"ce": 1.0, "l2": 0.0}, "teacher_cache": "somewhere"})
    assert recover_config(cached).losses.teacher_top_k == 0  # of use to other variants of the experiment
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

    def __call__(self, overwrite=False, scratch=(), journals=(), version=1, inputs=None, **settings):
        stage = Stage(
            name="depth/prune",
            version=version,
            workdir=self.folder,
            settings={"ratio": 0.3, **settings},
            inputs={"data.train": self.folder / "in.txt", **(inputs or {})},
            outputs=[self.folder / "out.txt"],
            scratch=scratch,
            journals=journals,
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


def test_a_new_input_is_named(work):
    work()
    (work.folder / "more.txt").write_text("more")
    with pytest.raises(UserError, match=r"was made from other inputs \(data.eval changed\)"):
        work(inputs={"data.eval": work.folder / "more.txt"})


def test_a_missing_output_is_made_again(work):
    work()
    (work.folder / "out.txt").unlink()
    assert work()["number"] == 2
    assert (work.folder / "out.txt").read_text() == "run 2"


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
    (scratch / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints exists and was not made by this stage"):
        work(scratch=[scratch])
    (scratch / "1").rmdir()  # an empty folder is nothing to lose

    def stopped():
        (scratch / "1").mkdir(parents=True)
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
    (scratch / "1").mkdir(parents=True)  # as if killed before they were removed
    work(scratch=[scratch])
    assert (seen, scratch.exists()) == ([True], False)


def test_journals_are_kept_for_the_same_inputs_and_never_in_the_way(work):
    journal, seen, body = work.folder / "out.journal", [], work.body

    def stopped():
        seen.append(journal.exists())
        journal.write_text("half")
        raise KeyboardInterrupt

    work.body = stopped
    for ratio in (0.3, 0.3, 0.4):
        with pytest.raises(KeyboardInterrupt):
            work(journals=[journal], ratio=ratio)
    work.body = lambda: seen.append(journal.exists()) or body()
    work(journals=[journal], ratio=0.4)
    assert seen == [False, True, False, True]
    assert not journal.exists()


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


def test_a_large_file_is_hashed_in_no_time_and_its_size_counts(tmp_path):
    path, found = tmp_path / "weights", []
    for size in (1 << 42, (1 << 42) + 1):
        path.touch()
        os.truncate(path, size)  # holes, which read as zeros
        found.append(ledger.digest(path))
    assert found[0] != found[1]


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
