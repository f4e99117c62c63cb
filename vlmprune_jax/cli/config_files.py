"""Between config files (ml_collections) and the typed experiment that the library takes."""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import tempfile
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from vlmprune_jax.cli.flags import file_of, load_file, locate, shipped_configs
from vlmprune_jax.core.checks import blaming
from vlmprune_jax.core.errors import UserError, error_context
from vlmprune_jax.core.links import check_links, real_path
from vlmprune_jax.core.settings import hints_of, override
from vlmprune_jax.data.hub import fetch_dataset, is_hub
from vlmprune_jax.experiment import recipes
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.experiment.variants import choose_variants, prefer_explicit, prune_runs, recover_runs
from vlmprune_jax.sweep.hyper import Hyper

_START = "_start"  # attribute of a ConfigDict: the experiment that it was made from


def experiment_config(recipe: str | None = None) -> ConfigDict:
    """Return a ConfigDict with all settings of an experiment at their defaults; config files change it and return it.

    Settings have their defaults, or what the `recipe` says (a family's name, as "llava": see families/).
    Whatever a config file or the command line sets afterwards wins. A dictionary assigned to a section sets what it
    names: `config.recover.losses = {"ce": 0.5, "kl": 0.5}` leaves the temperature as it was.

    Raises UserError for an unknown recipe.
    """
    start = Experiment() if recipe is None else override(Experiment(), recipes.recipe(recipe))
    return _starting_with(start, _section(start))


def _starting_with(start: Experiment, config: ConfigDict) -> ConfigDict:
    """Return the config, which remembers its settings before the user changes them, see `starting_point`."""
    object.__setattr__(config, _START, start)  # ConfigDict's own would make it a setting
    return config


def starting_point(flags: Any) -> Experiment:
    """Return the settings that the user did not choose: a shipped config's, or those a config file started from."""
    if real_path(file_of(flags.config_file)) in map(real_path, shipped_configs().values()):
        return getattr(shipped_config(flags.config_file), _START)
    return getattr(flags.config, _START, Experiment())


class _Section(ConfigDict):
    """ConfigDict of settings with defaults; a dictionary assigned to a subsection changes only the settings in it."""

    def __setitem__(self, key: str, value: Any) -> None:
        section = self.get(key)
        if isinstance(section, _Section) and isinstance(value, Mapping | ConfigDict):
            for name, setting in value.items():
                section[name] = setting
        else:
            super().__setitem__(key, ConfigDict(value) if isinstance(value, dict) else value)


def _sections(kind: type, given: Mapping[str, Any]) -> ConfigDict:
    """Return a ConfigDict with keys chosen by the user (evaluation sets); each value is a section of type `kind`."""

    class Sections(_Section):
        def __setitem__(self, key: str, value: Any) -> None:
            if key not in self and isinstance(value, Mapping | ConfigDict):
                super().__setitem__(key, _section(kind()))
            super().__setitem__(key, value)

    sections = Sections()
    for name, spec in given.items():
        sections[name] = _section(spec)
    return sections


def _section(spec: Any) -> ConfigDict:
    values: dict[str, Any] = {}
    for name, hint in hints_of(spec).items():
        value = getattr(spec, name)
        named = (*typing.get_args(hint), None)[1] if isinstance(value, Mapping) else None
        if dataclasses.is_dataclass(value):
            values[name] = _section(value)
        elif isinstance(named, type) and dataclasses.is_dataclass(named):
            values[name] = _sections(named, value)
        elif value is None:
            kind = next(option for option in typing.get_args(hint) if option is not types.NoneType)
            values[name] = config_dict.placeholder(kind)
        else:
            values[name] = ConfigDict(value) if isinstance(value, dict) else value
    return _Section(values)


def read_experiment(config: ConfigDict | None, *, only: str = "", explicit: Collection[str] = ()) -> Experiment:
    """Convert a ConfigDict of settings to a checked `Experiment`.

    Args:
      config: the config.
      only: names of the variants to run, see `choose_variants`.
      explicit: settings given on the command line, which replace those of variants.

    Raises:
      UserError: no config, an unknown setting, a value of the wrong type, an unknown variant, or see
        `prefer_explicit`.
    """
    if config is None:
        raise UserError("no config given: add --config=FILE.py (examples are in configs/)")
    experiment = choose_variants(override(Experiment(), config.to_dict()), only)
    experiment = prefer_explicit(experiment, explicit, "--config.")
    for pruned in prune_runs(experiment, Path()):  # what variants set is checked as well
        recover_runs(pruned)
    return experiment


def to_experiment(
    config: ConfigDict | None,
    workdir: str | None,
    *,
    only: str = "",
    explicit: Collection[str] = (),
    dry_run: bool = False,
) -> tuple[Experiment, Path]:
    """Return the checked experiment of a config and its workdir path; models with hub ids are downloaded.

    With `dry_run`, data sets that the workdir lacks go to a folder that is deleted when the process ends.
    """
    experiment = read_experiment(config, only=only, explicit=explicit)
    if not workdir:
        raise UserError("no workdir given: add --workdir=DIR, a folder for all files of this run")
    folder = to_workdir(workdir)
    scratch = Path(tempfile.mkdtemp(prefix="vlmprune-")) if dry_run else None
    if scratch is not None:
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return placed(experiment, folder, scratch), folder


def placed(experiment: Experiment, workdir: Path, scratch: Path | None = None) -> Experiment:
    """Return the experiment with local paths for hub ids; missing models and data sets are downloaded or made.

    `scratch`: folder of data sets that the workdir lacks; None for the workdir.
    """
    model, data, folder = experiment.model, experiment.data, workdir / "data"
    model = dataclasses.replace(
        model, hf_dir=_local(model.hf_dir), vision_dir=model.vision_dir and _local(model.vision_dir)
    )
    if data.source != "files":
        file_settings = [
            f"data.{name}" for name in ("train", "eval", "images", "eval_images") if getattr(data, name) is not None
        ]
        if file_settings:
            raise UserError(
                f"{file_settings[0]} is set, but this config reads {data.source}: add --config.data.source=files to "
                "use your own files"
            )
        from vlmprune_jax.demo.easyvqa import write_dataset

        out_dir = folder if scratch is None or folder.exists() else scratch / folder.name
        files = {name: str(path) for name, path in write_dataset(out_dir).items()}
        data = dataclasses.replace(data, train=files["train"], eval=files["test"], images=files["images"])
    else:
        named = {name: text for name in ("train", "eval") if is_hub(text := getattr(data, name))}
        fetched: dict[str, Any] = {
            name: fetch_dataset(text, folder, f"data.{name}", scratch) for name, text in named.items()
        }
        data = dataclasses.replace(data, **fetched)
    sets = {
        name: dataclasses.replace(spec, data=fetch_dataset(spec.data, folder, f"evaluate.sets.{name}.data", scratch))
        if spec.data is not None and is_hub(spec.data)
        else spec
        for name, spec in experiment.evaluate.sets.items()
    }
    evaluate = dataclasses.replace(experiment.evaluate, sets=sets)
    return dataclasses.replace(experiment, model=model, data=data, evaluate=evaluate)


def read_hyper(config: str) -> Any:
    """Return the runs of a sweep: the list that `get_hyper(hyper)` in the config file FILE.py:VARIANT returns."""
    module = load_file(config)[0]
    if not hasattr(module, "get_hyper"):
        raise UserError(
            f"--config={config}: has no get_hyper(hyper), which lists the runs of a sweep (see configs/sweeps/): add "
            "it, or use `vlmprune run`"
        )
    with blaming(f"--config={config}: get_hyper(hyper)", module.get_hyper):
        return module.get_hyper(Hyper())


def shipped_config(name: str) -> ConfigDict:
    """Return a config bundled with vlmprune (NAME or NAME:VARIANT), as a starting point for a config file."""
    config = load_file(locate(name))[1]
    return _starting_with(override(Experiment(), config.to_dict()), config)


def to_workdir(text: str) -> Path:
    """Return a workdir's path, which need not exist.

    Raises UserError if no folder can be there, or the folder has links to places outside it.
    """
    folder = Path(text)
    with error_context("--workdir"):
        real_path(folder)
    place = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    if not os.path.isdir(place) and os.path.lexists(place):
        broken = "a link to itself or to nothing" if os.path.islink(place) and not os.path.exists(place) else "a file"
        raise UserError(f"--workdir={text}: {place} is {broken}, expected a folder: choose another path")
    check_links(folder)
    return folder


def _local(name: str) -> str:
    """Download a model with a hub id and return its local snapshot folder; return a folder path or "" unchanged."""
    if not name or Path(name).is_dir():
        return name
    from vlmprune_jax.hf.read import resolve

    return str(resolve(name))
