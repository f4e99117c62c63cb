"""Between config files (Python or YAML) and the typed experiment that the library takes."""

from __future__ import annotations

import atexit
import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypedDict

import yaml
from ml_collections import ConfigDict, config_dict

from vlmprune_jax.base.checks import blaming, one_of
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import checked, open_file, parse_json, read_text, reading
from vlmprune_jax.base.links import check_links, real_path
from vlmprune_jax.base.settings import hints_of, override
from vlmprune_jax.io.data.datasets import fetch_dataset, is_hub
from vlmprune_jax.run.experiment import recipes
from vlmprune_jax.run.experiment.recipes import YAML, file_of, locate, shipped_configs
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import choose_variants, prefer_explicit, variants_of
from vlmprune_jax.run.sweep.hyper import Hyper

_MAX_YAML_BYTES = 2**18  # maximum size of a YAML config; usual configs have a few thousand bytes


def experiment_config(recipe: str | None = None) -> _Section:
    """Return a ConfigDict with all settings of an experiment at their defaults; config files change it and return it.

    Settings have their defaults, or the values of the `recipe` (name of a family, such as "llava": see families/).
    Values that a config file or the command line sets afterwards replace them. A dictionary assigned to a section
    changes only the settings that it names: `config.recover.losses = {"ce": 0.5, "kl": 0.5}` keeps the temperature.

    Raises UserError for an unknown recipe.
    """
    return _section(override(Experiment(), {} if recipe is None else recipes.recipe(recipe)))


def starting_point(flags: Any) -> Experiment:
    """Return the settings before the user's changes: those of a shipped config, or those a config file started from."""
    if real_path(file_of(flags.config_file)) in map(real_path, shipped_configs().values()):
        return shipped_config(flags.config_file)._start
    return flags.config._start if isinstance(flags.config, _Section) else Experiment()


class _Section(ConfigDict):
    """ConfigDict of settings with defaults; a dictionary assigned to a subsection changes only the settings in it."""

    _start: Any = None  # the settings before the user changes them
    _item: type | None = None  # type of the section that each key chosen by the user names (evaluation sets)

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, Mapping | ConfigDict):
            if key not in self and self._item is not None:
                super().__setitem__(key, _section(self._item()))
            if isinstance(section := self.get(key), _Section):
                for name, setting in value.items():
                    section[name] = setting
                return
        super().__setitem__(key, ConfigDict(value) if isinstance(value, dict) else value)

    def remember(self, attribute: str, value: Any) -> _Section:
        """Return this section with an attribute set that is no setting."""
        object.__setattr__(self, attribute, value)
        return self


def _section(spec: Any) -> _Section:
    section = _Section().remember("_start", spec)
    for name, hint in hints_of(spec).items():
        value = getattr(spec, name)
        if dataclasses.is_dataclass(value):
            section[name] = _section(value)
        elif isinstance(value, Mapping):
            kind = typing.get_args(hint)[1]
            named = dataclasses.is_dataclass(kind)
            section[name] = _Section().remember("_item", kind) if named else ConfigDict()
            for key, item in value.items():
                section[name][key] = vars(item) if named else item
        elif value is None:
            option = next(option for option in typing.get_args(hint) if option is not types.NoneType)
            section[name] = config_dict.placeholder(option)
        else:
            section[name] = value
    return section


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
        raise UserError("no config given: add --config=FILE.py or FILE.yaml (examples are in configs/)")
    experiment = choose_variants(override(Experiment(), config.to_dict()), only)
    experiment = prefer_explicit(experiment, explicit, "--config.")
    variants_of(experiment)  # what variants set is checked as well
    return experiment


def placed(experiment: Experiment, workdir: Path, *, dry_run: bool = False) -> Experiment:
    """Return the experiment with local paths for hub ids; missing models and data sets are downloaded or made.

    With `dry_run`, data sets that are not in the workdir yet are written to a temporary folder.
    """
    model, data, folder, scratch = experiment.model, experiment.data, workdir / "data", None
    if dry_run:
        scratch = Path(tempfile.mkdtemp(prefix="vlmprune-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    folders: dict[str, Any] = {"hf_dir": model.hf_dir, "vision_dir": model.vision_dir}
    for setting, name in folders.items():
        if name and not Path(name).is_dir():  # a hub id
            from vlmprune_jax.io.checkpoints.read import resolve

            folders[setting] = str(resolve(name))
    model = dataclasses.replace(model, **folders)

    def fetched(setting: str, name: str | None) -> Any:
        return fetch_dataset(name, folder, setting, scratch) if name is not None and is_hub(name) else name

    if data.source == "files":
        data = dataclasses.replace(
            data, **{name: fetched(f"data.{name}", getattr(data, name)) for name in ("train", "eval")}
        )
    else:
        for name in ("train", "eval", "images", "eval_images"):
            if getattr(data, name) is not None:
                raise UserError(
                    f"data.{name} is set, but this config reads {data.source}: add --config.data.source=files to use "
                    "your own files"
                )
        from vlmprune_jax.run.demo.easyvqa import write_dataset

        out_dir = folder if scratch is None or folder.exists() else scratch / folder.name
        files = {name: str(path) for name, path in write_dataset(out_dir).items()}
        data = dataclasses.replace(data, train=files["train"], eval=files["test"], images=files["images"])
    sets = {
        name: dataclasses.replace(spec, data=fetched(f"evaluate.sets.{name}.data", spec.data))
        for name, spec in experiment.evaluate.sets.items()
    }
    evaluate = dataclasses.replace(experiment.evaluate, sets=sets)
    return dataclasses.replace(experiment, model=model, data=data, evaluate=evaluate)


def read_hyper(config: str) -> Any:
    """Return the runs of a sweep: the list that `get_hyper(hyper)` in the config file FILE.py:VARIANT returns.

    In a YAML file, the runs are all combinations of the values under `sweep`.
    """
    if file_of(config).suffix in YAML:
        source = f"--config={config}"
        swept = _read_yaml(file_of(config), _SWEEP).get("sweep")
        if not swept or not all(swept.values()):
            raise UserError(f"{source}: lists no values to sweep: {_SWEEP}")
        hyper = Hyper()
        return hyper.product([hyper.sweep(setting, values) for setting, values in swept.items()])
    module = load_file(config)[0]
    if not hasattr(module, "get_hyper"):
        raise UserError(
            f"--config={config}: has no get_hyper(hyper), which lists the runs of a sweep (see configs/sweeps/): add "
            "it, or use `vlmprune run`"
        )
    with blaming(f"--config={config}: get_hyper(hyper)", module.get_hyper):
        return module.get_hyper(Hyper())


def load_file(config: str) -> tuple[types.ModuleType, Any]:
    """Import a config file FILE.py:VARIANT; return the module and the result of its function `get_config`.

    Importing the file registers the criteria, metrics and so on that it defines.
    """
    file, (_, mark, variant) = file_of(config), config.partition(".py:")
    loader = importlib.machinery.SourceFileLoader(f"{file.stem}_config", str(file))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    folder = str(real_path(file).parent)
    sys.path.insert(0, folder)  # so that the file can import the user's criteria from files beside it
    try:
        loader.exec_module(module)
        return module, module.get_config(*([variant] if mark else []))
    finally:
        sys.path.remove(folder)


def load_config(config: str) -> ConfigDict:
    """Return the config in a Python or YAML file; raise a one-line UserError if the file cannot be loaded."""
    file = file_of(config)
    if os.path.lexists(file):  # a FIFO would block
        open_file(file).close()
    try:
        loaded = _load_yaml(file) if file.suffix in YAML else load_file(config)[1]
        if not isinstance(loaded, ConfigDict):
            raise TypeError(f"get_config() returned {type(loaded).__name__}, expected an experiment_config()")
        return loaded
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a config file may raise
        lines = str(error).strip().splitlines()
        problem = lines[-1].strip() if lines and isinstance(error, Exception) else repr(error)
        raise UserError(f"--config={config}: cannot be loaded ({problem}); --debug shows more") from error


class _YamlLoader(yaml.SafeLoader):
    """YAML loader that refuses Python objects, aliases (which expand a few lines to gigabytes) and repeated names."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a name occurs twice in this section", problem_mark=node.start_mark)
        return mapping


# 1e-4 is a number, as in YAML 1.2 and JSON; PyYAML alone reads a text.
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


_SWEEP = "add `sweep: {prune.ratio: [0.1, 0.3]}` (see docs/how-to/sweep.md), or use `vlmprune run`"
_YAML_TODO = "write settings as in docs/how-to/own-data.md"


class _Start(TypedDict, total=False):
    """Keys of a YAML config that are no settings: its starting point (at most one of two), and values for a sweep."""

    recipe: str
    shipped_config: str
    sweep: dict[str, list[Any]]


def _load_yaml(file: Path) -> ConfigDict:
    """Return the config in a YAML file: settings by name, on top of its `recipe` or `shipped_config` if it has one.

    Raises UserError for a file that is not YAML, or for settings as `override` does.
    """
    settings: dict[str, Any] = {**_read_yaml(file, _YAML_TODO)}
    settings.pop("sweep", None)
    with error_context(f"--config={file}"):
        name = settings.pop("shipped_config", None)
        if name is None:
            config = experiment_config(settings.pop("recipe", None))
        else:
            one_of("shipped_config", name.partition(":")[0], shipped_configs())  # no other Python file is executed
            config = shipped_config(name)
        start = config._start
        return _section(override(start, settings)).remember("_start", start)


def _read_yaml(file: Path, todo: str) -> _Start:
    """Return the content of a YAML file, of JSON's types only; raise UserError if it has others or is not YAML."""
    source, content = f"--config={file}", read_text(file, _MAX_YAML_BYTES)
    with reading(source, _YAML_TODO):
        try:
            loader = _YamlLoader(content)
            loader.name = file.name  # for messages
            text = json.dumps(loader.get_single_data())  # fails for what JSON does not have, such as dates
        except yaml.MarkedYAMLError as error:
            error.context = error.context_mark = None  # keep the problem and its place
            raise
    return checked(parse_json(text, source, _YAML_TODO), _Start, source, todo)


def shipped_config(name: str) -> _Section:
    """Return a config bundled with vlmprune (NAME or NAME:VARIANT), as a starting point for a config file."""
    return _section(override(Experiment(), load_file(locate(name))[1].to_dict()))


def to_workdir(text: str | None) -> Path:
    """Return a workdir's path, which need not exist.

    Raises UserError if there is no path, it cannot be a folder, or the folder has links to places outside it.
    """
    if not text:
        raise UserError("no workdir given: add --workdir=DIR, a folder for all files of the run (or runs of a sweep)")
    folder = Path(text)
    with error_context("--workdir"):
        real_path(folder)
    place = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    if not os.path.isdir(place) and os.path.lexists(place):
        broken = "a dangling or circular link" if os.path.islink(place) and not os.path.exists(place) else "a file"
        raise UserError(f"--workdir={text}: {place} is {broken}, expected a folder: choose another path")
    check_links(folder)
    return folder
