"""Settings of any value: an experiment comes out, or one line that names the setting."""

import dataclasses
import json

from fuzz_cases import ESCAPES, damaged, edited, fuzz, fuzz_file, reads
from hypothesis import strategies as st
from repository import ROOT

from vlmprune_jax.base.settings import override
from vlmprune_jax.run.cli.config_files import read_experiment
from vlmprune_jax.run.cli.flags import parse
from vlmprune_jax.run.cli.stages import stage_command
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import check_experiment

WHOLE = json.loads(json.dumps(dataclasses.asdict(Experiment())))
YAML = b"recipe: llava\nmodel: {hf_dir: DIR}\nrecover:\n  epochs: 2.5e-1\n  losses: {l2_layers: [-1, 2]}\n"
CONFIG = ROOT / "configs/llava15_7b.py"
VALUES = (
    "", "x", "None", "True", "-1", "0", "1.5", "nan", "inf", "1e400", "9" * 5000, "()", "(1,", "[1,2]", "{'a': 1}",
    "__import__('os').abort()", "(" * 3000, "-" * 3000 + "1", ESCAPES.replace("\0", ""), "../x", "a/b", "\udcff",
)  # fmt: skip


def test_overrides():
    @fuzz(200, values=edited(WHOLE, 3))
    def check(values):
        if isinstance(values, dict):
            reads(lambda: check_experiment(override(Experiment(), values)))

    check()


def names(section, where=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        yield from names(value, f"{where}{field.name}.") if dataclasses.is_dataclass(value) else [where + field.name]


def experiment_of(*flags):
    return read_experiment(parse("score", stage_command("score"), [*flags]).config)


def test_flags(tmp_path):
    known = [*names(Experiment()), "prune_variants.a", "data", "data.max_lenght", "x", ESCAPES.replace("\0", "")]

    @fuzz(60, name=st.sampled_from(known), value=st.sampled_from(VALUES))
    def check(name, value):
        reads(lambda: experiment_of(f"--config={CONFIG}", f"--workdir={tmp_path}", f"--config.{name}={value}"))

    check()


def test_yaml(tmp_path):
    file = tmp_path / "my.yaml"
    fuzz_file(60, file, lambda: experiment_of(f"--config={file}"), files=damaged(YAML))
