"""vlmprune plan --config=FILE.py --topology=v5e:8x8: memory and minimum time of recovery on a TPU slice, without a TPU.

Compiles the real training step of student and teacher for every variant (1 to 2 minutes each), for the largest length
and tile buckets. Prints memory, FLOPs, communication and minimum time; the report of --workdir shows them as well.
Reads config.json but no weights. Pruned shapes come from plan.json in --workdir, or are predicted.
--evaluation adds memory and the minimum time for 1,000 questions of each benchmark by phase, computed from shapes;
--weights=bf16,w8a8,w4a16 includes quantised weights.
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.run.cli.flags import Flags, config_flag, only_flag


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune plan`."""
    config_flag(values)
    only_flag(values)
    about = "workdir of the run: its plan.json files are read, and its report shows the numbers"
    absl_flags.DEFINE_string("workdir", None, about, flag_values=values)
    about = "TPU slice, such as v5e:8x8, v5p:4x4x4, v6e:8x8 or tpu7x:2x2x2; two slices: v5e:8x8:2"
    absl_flags.DEFINE_string("topology", None, about, flag_values=values)
    about = "number of training records, if data.train is not on this machine"
    absl_flags.DEFINE_integer("records", None, about, lower_bound=1, flag_values=values)
    absl_flags.DEFINE_bool("evaluation", False, "also plan the evaluation of every pruned model", flag_values=values)
    about = "formats of the decoder's weights for --evaluation: bf16, w8a8, w4a16"
    absl_flags.DEFINE_list("weights", ["bf16"], about, flag_values=values)
    about = "JSON file for the results (default: WORKDIR/tpu_plan.json)"
    absl_flags.DEFINE_string("save", None, about, flag_values=values)


def run(flags: Any) -> None:
    """Compile the recovery step of every variant for a TPU slice; print and save its memory and time."""
    from pathlib import Path

    import jax

    from vlmprune_jax.base.console import make_reporter
    from vlmprune_jax.base.errors import UserError
    from vlmprune_jax.run.cli.config_files import read_experiment, to_workdir
    from vlmprune_jax.run.planning.fit import fit_all
    from vlmprune_jax.run.workdir.artefact import write_artefact
    from vlmprune_jax.run.workdir.tpu_plan import TPU_PLAN

    jax.config.update("jax_platforms", "cpu")  # libtpu is here to compile, there may be no TPU and it stays free
    experiment = read_experiment(flags.config, only=flags.only, explicit=flags.explicit)
    if not flags.topology:
        raise UserError("no TPU slice given: add --topology=v5e:8x8 (or v5p:4x4x4, v6e:8x8, tpu7x:2x2x2)")
    workdir = None if flags.workdir is None else to_workdir(flags.workdir)
    formats = tuple(flags.weights) if flags.evaluation else ()
    planned = fit_all(experiment, workdir, make_reporter(True), flags.topology, flags.records, formats)
    saved = flags.save or (workdir and workdir / TPU_PLAN)
    if saved:
        write_artefact(Path(saved), planned)
