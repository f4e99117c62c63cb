"""Settings that have no effect on a run although the user set them, each with the reason."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.prune import CRITERIA
from vlmprune_jax.core.recovery.terms import needs_teacher, terms_of
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.exports.formats import choose_format
from vlmprune_jax.io.families import family_of
from vlmprune_jax.run.evaluation.config import EvaluationSetSpec
from vlmprune_jax.run.experiment.arguments import evaluation_sets, export_options, with_rounding
from vlmprune_jax.run.experiment.spec import Experiment, options
from vlmprune_jax.run.experiment.variants import variants_of
from vlmprune_jax.run.stages.prune import criteria_of
from vlmprune_jax.run.stages.stage import STAGES, without_scores
from vlmprune_jax.run.stages.work import source_config

# (patterns of settings, separated by spaces; True if these have no effect; the reason)
Rule = tuple[str, bool, str]
DEFAULTS = Experiment()


def unused_lines(
    experiments: Collection[Experiment], sections: Collection[str] = (), start: Experiment = DEFAULTS
) -> list[str]:
    """Return the result of `unused_settings` as lines, one per reason.

    Experiments whose model cannot be read are left out, because their runs report this.
    """
    configs = dict[ModelSpec, ModelConfig]()
    for model in dict.fromkeys(experiment.model for experiment in experiments):
        with contextlib.suppress(UserError):
            configs[model] = source_config(model)
    pairs = [(experiment, configs[experiment.model]) for experiment in experiments if experiment.model in configs]
    unused = unused_settings(pairs, sections, start)
    return [f"no effect: {', '.join(names)}, because {why}" for why, names in unused.items()]


def unused_settings(
    pairs: Iterable[tuple[Experiment, ModelConfig]], sections: Collection[str] = (), start: Experiment = DEFAULTS
) -> dict[str, list[str]]:
    """Return {reason: settings} for settings that the user set but that change nothing in any variant.

    Args:
      pairs: experiments, each with the config of its unpruned model.
      sections: only settings of these sections; () = all sections. Sections that a user-defined stage receives are left
        out, because only this stage knows which of their settings it uses.
      start: config from which the user started, such as a shipped config. Values in this config, in one of its
        variants, or equal to a default do not count as set by the user.
    """
    runs = [(run, cfg) for experiment, cfg in pairs for run in _variants(experiment)]
    # The name of a recovery is that of its variant.
    names = [o.name for o in options() if o.section and ".NAME" not in o.name and o.name != "recover.name"]
    user_sections = {section for stage in STAGES.values() if stage.run is not None for section in stage.sections}
    taken = ({*sections} or {name.partition(".")[0] for name in names}) - user_sections
    names = [name for name in names if name.partition(".")[0] in taken]
    values = {name: operator.attrgetter(name) for name in names}
    given = {name: [value(run) for run in (DEFAULTS, start, *_variants(start))] for name, value in values.items()}
    changed = [name for name, value in values.items() if any(value(run) not in given[name] for run, _ in runs)]
    reasons = list[dict[str, str]]()
    for run, cfg in runs:
        by_setting = dict[str, str]()
        for patterns, idle, why in itertools.chain(_pruning(run, cfg), _training(run, cfg), _evaluation(run, cfg)):
            for name in changed if idle else ():
                if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
                    by_setting.setdefault(name, why)
        reasons.append(by_setting)
    unused: dict[str, list[str]] = {}
    for name in changed:
        if all(name in by_setting for by_setting in reasons):
            unused.setdefault(reasons[0][name], []).append(name)
    return unused


def _variants(experiment: Experiment) -> list[Experiment]:
    """Return one experiment per recovery of every pruned model, and one per pruned model without recoveries."""
    return [
        variant
        for pruned in variants_of(experiment)
        for variant in [run.experiment for run in pruned.recoveries] or [pruned.experiment]
    ]


def _pruning(run: Experiment, cfg: ModelConfig) -> Iterator[Rule]:
    score, prune, budget, method = run.score, run.prune, run.prune.budget, run.prune.method
    criteria = [*dict.fromkeys(criteria_of(score, prune).values())]
    used = {name for criterion in criteria for name in CRITERIA[criterion].options_in(score)}
    calibrates = any(CRITERIA[criterion].needs_batches for criterion in criteria)
    yield "score.*", not criteria, without_scores(prune)
    yield "score.depth", method == "width", 'prune.method="width" scores heads and neurons only'
    yield "score.width", method == "depth", 'prune.method="depth" scores layers only'
    subject = f"the criterion {' and '.join(criteria)}"
    for name in {*settings_of(score)} & {option for every in CRITERIA.values() for option in every.settings} - {"seed"}:
        yield f"score.{name}", name not in used, f"{subject} does not use it"
    yield "score.options", not used & {*score.options}, f"{subject} has none of these options"
    yield "score.samples score.batch_size score.longest_text", not calibrates, f"{subject} reads no records"
    yield "score.seed", not calibrates and "seed" not in used, f"{subject} reads no records"
    yield "prune.[!m]* reconstruct.*", method == "none", without_scores(prune)
    yield "prune.[!vl]*", prune.only_vocabulary, without_scores(prune)  # loads_in is checked nevertheless
    yield "prune.rounding prune.depth_share", prune.layers_removed is not None, "prune.layers_removed is set"
    yield "prune.rounding", bool(prune.layers), "prune.layers is set"
    yield "prune.attn_layers prune.heads_multiple", prune.heads == "keep", 'prune.heads="keep" removes no heads'
    yield "prune.deepstack", not cfg.deepstack, "vision features enter no decoder layer of this model"
    yield "prune.producers", not cfg.text.producers, "no layer of this model reuses keys and values of another layer"
    yield "prune.budget.bench", budget.decode_ms is None, "prune.budget.decode_ms is not set"
    yield "prune.budget.slice", budget.step_ms is None, "prune.budget.step_ms is not set"
    of_rows = (budget.memory_bytes, budget.step_ms)
    yield "prune.budget.batch", of_rows == (None, None), "no limit on memory or step time is set"
    unused = (*of_rows, budget.flops) == (None, None, None)
    yield "prune.budget.context prune.budget.images", unused, "no limit on memory, FLOPs or step time is set"
    yield "prune.vocabulary.*", prune.vocabulary.size is None, "prune.vocabulary.size is not set"
    repairs, off = run.reconstruct.method != "none", 'reconstruct.method="none" repairs no weights'
    chosen, values = choose_format(
        run.export.format, export_options(with_rounding(run.export, run.data, run.recover, cfg.text))
    )
    yield "reconstruct.readers reconstruct.refit reconstruct.held_out", not repairs, off
    yield "reconstruct.*", not repairs and chosen.calibration(values) is None, off


def _training(run: Experiment, cfg: ModelConfig) -> Iterator[Rule]:
    recover, data, losses = run.recover, run.data, run.recover.losses
    if recover.method == "none":
        yield "recover.*_cache data.*_cache data.fraction data.group_by", True, 'recover.method="none" trains nothing'
        return
    taught = needs_teacher(losses)
    yield "data.seed", data.fraction == 1, "data.fraction is 1"
    yield "data.truncate", not (data.max_length or data.length_buckets), "data.max_length is not set"
    yield "recover.epochs", recover.steps is not None, "recover.steps is set"
    yield "recover.lora.*", recover.adapters is None, f"recover.trainable={recover.trainable!r} trains no adapters"
    yield "recover.projector_learning_rate", cfg.projector is None, "this model has no projector"
    yield "recover.teacher_* recover.losses.teacher_inputs", not taught, "no loss needs a teacher"
    yield "recover.teacher_top_k", recover.teacher_cache is None, "recover.teacher_cache is not set"
    compares = bool(terms_of(losses, teacher=True, hidden=False)) or bool(losses.extra)
    yield "recover.losses.temperature recover.losses.kl_positions", not compares, "no loss compares logits"
    yield "recover.losses.chunk", not terms_of(losses, hidden=False), "no loss uses logits"
    yield "recover.losses.l2_layers", not terms_of(losses, reported=True, hidden=True), "no loss compares hidden states"
    yield "recover.control", not terms_of(losses, teacher=False), "no loss uses labels, so there is no control"
    yield "recover.control", run.prune.method == "none", without_scores(run.prune)
    yield "recover.losses.reference_compat", not (taught or losses.extra), "no loss needs a teacher"


def _evaluation(run: Experiment, cfg: ModelConfig) -> Iterator[Rule]:
    sets = evaluation_sets(run.data, run.evaluate)
    overrides = {name: run.evaluate.sets.get(name, EvaluationSetSpec()) for name in sets}
    asked, texts = ([overrides[name] for name in sets if (sets[name].text is None) == asks] for asks in (True, False))
    names = {f"evaluate.{name}": name for name in ("metric", "prompt_suffix", "max_new_tokens", "questions")}
    for setting, name in (names | {"data.eval": "data", "data.eval_images": "images"}).items():
        yield setting, all(getattr(each, name) is not None for each in asked), "no set with questions uses it"
    last = run.recover.method == run.reconstruct.method == "none"
    yield "evaluate.unrecovered", last, "nothing is reconstructed or trained after pruning"
    yield "evaluate.max_length", not asked, "no set has questions"
    yield "evaluate.text_window", all(text.text_window is not None for text in texts), "no set with a text uses it"
    family, tower = family_of(cfg), cfg.vision
    of_images = "data.*tile* data.thumbnail data.max_image* data.aspect_ratio data.eval_images speed.image"
    yield of_images, tower is None, "this model takes no images"
    yield "data.aspect_ratio", family.images != "whole", "this model does not make images square"
    yield "model.vision_dir", not family.separate_vision, "the folder of this model has its vision tower"
    yield "export.rolled_positions", tower is None or not tower.class_token, "no vision tower has a class token"
    yield "speed.new_tokens speed.batch_size", not run.speed.rounds, "speed.rounds is 0"
