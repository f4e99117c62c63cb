"""Flags of the commands: configs by name, settings by flag, and what is wrong with a command line."""

import pytest
from repository import ROOT

from vlmprune_jax.run.cli.config_files import read_experiment
from vlmprune_jax.run.cli.flags import parse
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.cli.stages import stage_command


def failing(capsys, *argv):
    """The one line that a command prints when it exits with code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vlmprune: error: ")
    assert err.count("\n") == 1, err
    return out + err


def test_a_config_that_comes_with_vlmprune_is_found_by_name(capsys):
    for config in ("demo:quick", "llava15_7b:width,0.3,uniform", str(ROOT / "configs" / "bunny_3b.py")):
        assert main(["run", f"--config={config}"]) == 2
        assert "no workdir given" in capsys.readouterr().err
    assert main(["run", "--config", "demos"]) == 2
    assert "--config=demos: no such file, and no shipped config of this name; did you mean" in capsys.readouterr().err
    assert main([]) == 0
    assert "(--config=NAME): bunny_3b, demo,\n" in capsys.readouterr().out


CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config(variant="none"):
    config = experiment_config()
    config.prune = {"ratio": {"none": 0.3, "half": 0.5}[variant]}
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG)
    (tmp_path / "dict.py").write_text("def get_config():\n    return {}\n")
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdri=x"], "vlmprune run has no flag --workdri; did you mean 'workdir'?"),
        (["--config={file}", "--config.score.by_kind=True"], "score has no setting 'by_kind': it is now"),
        (["--config={file}", "--config.prune.ratoi=0.2"], "config.prune has no setting 'ratoi'; did you mean 'ratio'?"),
        (["--config={file}", "--config.prune.ratio=much"], "could not convert string to float"),
        (["--config={file}", "--config.prune.ratio.x=1"], "config.prune.ratio is a setting, not a section"),
        (["--config.prune.ratio=0.2"], "name the file as well (--config=FILE.py)"),
        (["--config=nowhere.py"], "--config=nowhere.py: cannot be loaded"),
        (["--config={file}:third"], "cannot be loaded ('third')"),
        (["--config={file}", "--config"], "Missing value for flag --config"),
        (["--config={file}", "config.prune.ratio=0.2"], "takes no argument 'config.prune.ratio=0.2': write settings"),
        (["--config={dir}/dict.py"], "dict.py: cannot be loaded (get_config"),
        (["--config={file}", "--config.data.threads=None"], "config.data.threads=None must be a whole number"),
        ([], "no config given: add --config=FILE.py"),
        (["--config={file}"], "no workdir given: add --workdir=DIR"),
        (["--config={file}", "--workdir={file}"], "is a file, expected a folder"),
        (["--config={file}", "--workdir={dir}/w"], "model.hf_dir is not set"),
        (["--config={file}", "--workdir={dir}/w", "--config.model.hf_dir=/no/where"], "/no/where: no such folder"),
        (["--config={file}", "--workdir={dir}/w", "--config.model.hf_dir={dir}"], "data.eval is not set"),
        (["--config={file}", "--workdir={dir}/w", "--config.export.layout=hf"], "export.layout 'hf' is not one of"),
        (["--config={file}", "--workdir={dir}/w", "--config.score.depth=taylor"], "use block_influence or angular or"),
        (["--config={file}", "--workdir={dir}/w", "--config.score.width=block_influence"], "use taylor or activation"),
        (["--config={file}", "--workdir={dir}/w", "--config.prune.steps=2"], "is only for prune.method='width'"),
        (["--config={file}", "--workdir={dir}/w", "--config.recover.remat=ful"], "did you mean 'full'?"),
    ],
)
def test_wrong_command_lines(capsys, config_file, flags, message):
    filled = [flag.format(file=config_file, dir=config_file.parent) for flag in flags]
    assert message in failing(capsys, "run", *filled)
    assert not (config_file.parent / "w").exists()


def test_a_setting_can_be_unset(config_file, monkeypatch):
    """What a config file sets, where a recipe or another variant sets something else instead."""
    seen = []
    monkeypatch.setattr(
        "vlmprune_jax.run.cli.stages.run_command", lambda _, flags: seen.append(read_experiment(flags.config))
    )
    texts = ["--config.data.system=", "--config.data.images=None", "--config.prune.layers_removed=3"]
    texts += ["--config.model.vision_dir", "None"]
    assert main(["run", f"--config={config_file}:half", "--config.prune.ratio=None", *texts]) == 0
    (experiment,) = seen
    assert (experiment.prune.ratio, experiment.prune.layers_removed) == (None, 3)
    assert (experiment.data.system, experiment.data.images, experiment.model.vision_dir) == ("", None, None)


def test_every_spelling_of_a_setting_replaces_that_of_a_variant(config_file):
    spellings = ["--config.data.threads=2", "-config.prune.ratio", "0.4", "--noconfig.data.truncate"]
    found = parse("run", stage_command("run"), [f"--config={config_file}", *spellings])
    assert found.explicit == ["data.threads", "prune.ratio", "data.truncate"]


def test_a_report_is_of_all_models(capsys, tmp_path):
    for flag in ("--dry_run", "--only=width"):
        assert "leave --dry_run and --only out" in failing(capsys, "report", f"--workdir={tmp_path}", flag)
