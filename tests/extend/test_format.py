"""The export format that docs/how-to/extend.md links, from a config that imports it, through `vlmprune export`."""

import json
import sys

import numpy as np
import pytest
from experiment_cases import registered
from hf_cases import copy_llava, keep_layers
from safetensors.flax import load_file

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.run.cli.main import main

CONFIG = """
import jax_parameters
from vlmprune_jax.run.cli.config_files import experiment_config


def get_config():
    config = experiment_config()
    config.model.hf_dir = "{root}/teacher"
    config.export.format = "jax_parameters"
    config.export.options = {{"prefix": "params/"}}
    return config
"""


@pytest.fixture
def command(goldens, tmp_path):
    """The command for a workdir with a pruned model and a config beside the printed file."""
    source = copy_llava(goldens, tmp_path / "teacher")
    vp.prune_folder(source, keep_layers(vp.load(source), [0, 2, 5])[1], tmp_path / "w/pruned")
    (tmp_path / "config.py").write_text(CONFIG.format(root=tmp_path))
    with registered("An export format", tmp_path, vp.formats):
        yield ["export", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'w'}"]


def test_the_printed_format_is_written_checked_and_described(command, tmp_path, capsys):
    assert main([*command, "--config.export.dtype=float32"]) == 0, capsys.readouterr().err
    out = tmp_path / "w/export"
    assert {path.name for path in out.iterdir()} == {"README.md", "model.safetensors", "plan.json"}
    expected = flatten(vp.load(tmp_path / "w/pruned").params)
    stored = load_file(out / "model.safetensors")
    assert set(stored) == {f"params/{path}" for path in expected}
    assert all(np.array_equal(stored[f"params/{path}"], array) for path, array in expected.items())
    facts = json.loads((tmp_path / "w/.stages/export.json").read_text())["facts"]
    assert facts == {"backend": "jax", "max_abs_logit_difference": 0.0, "tolerance": 0.1}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: jax\n")
    assert "3 of 6 layers" in card
    assert "## Loading\n\n`load_file(...)`" in card
    capsys.readouterr()
    assert main([*command, "--config.export.dtype=float32"]) == 0
    assert "export: unchanged, skipped" in capsys.readouterr().out

    # Another option or an edited file makes another export; the old folder is replaced only when asked.
    assert main(command) == 2
    assert '(export.dtype was "float32", now "bfloat16")' in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0, capsys.readouterr().err
    assert load_file(out / "model.safetensors")["params/text/embed_tokens/weight"].dtype == "bfloat16"
    with open(tmp_path / "jax_parameters.py", "a") as file:
        file.write("# edited\n")
    assert main(command) == 2
    assert "format jax_parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("format=jax_parametres", "did you mean 'jax_parameters'?"),
        ("dtype=source", "export.dtype 'source' is not one of float32, bfloat16, float16"),
        ("layout=transformers", "layout='transformers' is an option of format 'huggingface'"),
        ("quantize=q8_0", "quantize 'q8_0' is not supported by format 'jax_parameters' (supported: none)"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(command, tmp_path, capsys, flag, message):
    assert main([*command, f"--config.export.{flag}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w/export").exists()


def test_an_unknown_option_is_refused_with_a_suggestion(command, tmp_path):
    sys.path.insert(0, str(tmp_path))
    try:
        import jax_parameters  # noqa: F401
    finally:
        sys.path.remove(str(tmp_path))
    model = vp.load(tmp_path / "w/pruned")
    with pytest.raises(vp.UserError, match="has no option 'perfix'; did you mean 'prefix'"):
        vp.save(model, tmp_path / "out", source_dir=tmp_path / "w/pruned", format="jax_parameters", perfix="params/")
