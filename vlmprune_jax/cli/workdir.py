"""What the stage commands have in common: from flags to an experiment and a place to work."""

from __future__ import annotations

from typing import Any

from absl import logging
from transformers.utils.logging import disable_progress_bar

from vlmprune_jax.cli.config_files import to_experiment
from vlmprune_jax.distributed.mesh import initialize, is_main_process
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.experiment.variants import check_experiment
from vlmprune_jax.stages.console import make_reporter
from vlmprune_jax.stages.context import Context


def prepare(flags: Any) -> tuple[Experiment, Context]:
    """The experiment and the context of a stage command.

    Raises:
      UserError: see `initialize`, `to_experiment` and `check_experiment`.
    """
    quiet()
    initialize(flags.coordinator, flags.num_processes, flags.process_id)
    experiment, workdir = to_experiment(flags.config, flags.workdir)
    check_experiment(experiment, workdir)
    return experiment, Context(workdir, make_reporter(is_main_process()), flags.overwrite)


def quiet() -> None:
    """Leave it to us to say how far the work is."""
    logging.set_verbosity(logging.ERROR)  # orbax and grain narrate at lower levels
    disable_progress_bar()  # the bars here are our own
