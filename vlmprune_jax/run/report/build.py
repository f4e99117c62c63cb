"""Pages of results: of a run, finished or not (`report.html`, `report.png`), and of a sweep (`sweep.html`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from vlmprune_jax.base.errors import printable
from vlmprune_jax.base.files import MAX_JSON_BYTES, read_text
from vlmprune_jax.run.report import figures
from vlmprune_jax.run.report.page import Section, Table, write_page
from vlmprune_jax.run.report.speed import LIMITS, RULE, bench_notes, bench_tables, speed_notes, speed_tables
from vlmprune_jax.run.report.tables import groups_of, key_numbers, lead, parameter_note, tables_of
from vlmprune_jax.run.workdir.artefact import find_artefact, read_artefact
from vlmprune_jax.run.workdir.comparison import averaged_sets
from vlmprune_jax.run.workdir.groups import Comparison, comparison_of_run, comparison_of_sweep
from vlmprune_jax.run.workdir.result import RESULT, Result, read_result
from vlmprune_jax.run.workdir.samples import SAMPLES, Sample, Samples, SampleSet
from vlmprune_jax.run.workdir.speed import BENCH, SPEED, Bench, Speed
from vlmprune_jax.run.workdir.steps import STEPS, Steps, read_unfinished
from vlmprune_jax.run.workdir.sweep import DONE, FAILED, SweepResult, read_sweep
from vlmprune_jax.run.workdir.tpu_plan import NOTES as PLAN_NOTES
from vlmprune_jax.run.workdir.tpu_plan import TPU_PLAN, TpuPlan
from vlmprune_jax.run.workdir.vocabulary import VOCABULARY, VocabularyReport

NOTES = (
    "Retained: share of the unpruned model's score{averages}. Size: share of its parameters. Decoding and prompt: "
    "measured speed of the shape, as a multiple of the unpruned model's. {rule}. Removed: share of all parameters, and "
    "of the decoder's. Data: share of the training records. MiB: weights on disk. Seconds: scoring, pruning, "
    "reconstruction and training, without evaluation, in whichever run did it."
)
AVERAGES = (
    ", the mean over {sets}. Paper avg: the sum of all scores, each divided by a perfect model's, as a share of the "
    "unpruned model's sum"
)
CONTROLS = (
    " Of control: share of the score of the unpruned model after the same recovery, without the gain from training "
    "on the task."
)
INTERVALS = (
    " Intervals: 95 %, over questions that both models answer (by Bonett and Price, 2006, for right and wrong answers, "
    "by a paired bootstrap for other scores), and over seeds (Student's t) if there are several."
)
VOCABULARY_HEADER = (
    "held-out texts", "texts", "split as before", "tokens, +%", "broken", "bits/byte before", "bits/byte after"
)  # fmt: skip
VOCABULARY_NOTE = (
    "Broken: texts made of kept tokens that are tokenised differently (0 for a closed vocabulary). Bits per "
    "byte: of the unpruned model with the whole and with the trimmed vocabulary."
)
MOST_MODELS = 3  # maximum models named for an answer; further ones are counted
HEADINGS = {
    "repaired": "Broken by pruning, repaired by recovery",
    "broken": "Broken by pruning, and still wrong",
    "other": "Other questions",
}
COMMAND = "vlmprune run --config=FILE.py --workdir={}{}"


def build_report(workdir: Path) -> Path:
    """Write `report.html` (one self-contained file) and, if models were evaluated, `report.png`.

    `workdir`: workdir of a run, finished or not. Returns the page's path.

    Raises UserError if the workdir has no file of a run, or a file is damaged.
    """
    path, steps = workdir / RESULT, find_artefact(workdir / STEPS, Steps)
    title = "Structural pruning report" if steps is None or not steps.model else f"Pruning of {steps.model}"
    title += "" if steps is None or not steps.sets else f", evaluated on {steps.sets}"
    if not os.path.lexists(path):
        unfinished = read_unfinished(workdir)
        result = None if unfinished.result is None else unfinished.result.distinct()
        sections = [*_sections(workdir, result, unfinished.plans, finished=False)]
        text = "This run is not finished. The page shows the results so far."
        return write_page(workdir / "report.html", printable(title), sections, lead=[text], missing=unfinished.missing)
    known = read_result(workdir)
    result = known.distinct()
    comparison = comparison_of_run(result)
    plans = {run.plan: run.scores for run in known.runs}
    return write_page(
        workdir / "report.html",
        printable(title),
        [*_sections(workdir, result, plans, finished=True), _export(result)],
        lead=[lead(comparison)],
        numbers=_measured(comparison),
        best="" if comparison.best is None else comparison.best.title,
        result_json=read_text(path, MAX_JSON_BYTES),
    )


def build_sweep_page(workdir: Path) -> Path:
    """Write a sweep's page `sweep.html` (one self-contained file); return its path.

    Raises UserError if `sweep.json` is missing or damaged.
    """
    sweep = read_sweep(workdir)
    comparison = comparison_of_sweep(sweep)
    states = Counter({entry.run: entry.status for entry in sweep.models}.values())
    left = ", ".join(f"{number} {state}" for state, number in states.items() if state != DONE)
    runs = f"{states[DONE]} of {states.total()} runs are done{f' ({left})' if left else ''}"
    return write_page(
        workdir / "sweep.html",
        "Comparison of pruned models",
        [*_comparison_sections(comparison), *_open_runs(sweep)],
        lead=[f"{runs}: {len(sweep.done)} models.", *filter(None, [lead(comparison)])],
        numbers=_measured(comparison),
        best="" if comparison.best is None else comparison.best.title,
        origin=f"Made by vlmprune sweep --config={printable(sweep.config)}; numbers: sweep.json, sweep.csv.",
    )


def _measured(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the key numbers without speed-ups that are not measurable."""
    return [(name, value) for name, value in key_numbers(comparison) if value[0].isdigit()]


def _comparison_sections(comparison: Comparison, png: Path | None = None) -> Iterator[Section]:
    """Yield the report sections that runs and sweeps share; `png`: file for the main figure."""
    tables = tuple(tables_of(comparison, runs=True))
    yield Section("Models", tables=tables, notes=_notes(comparison), folded=False)
    yield from figures.cost_section(comparison, png)
    yield from figures.ratio_section(comparison.groups)
    yield from figures.data_section(comparison.groups)


def _notes(comparison: Comparison) -> tuple[str, ...]:
    averaged, models = averaged_sets(comparison.sets), [group.first for group in comparison.groups]
    averages = AVERAGES.format(sets=", ".join(averaged)) if len(averaged) > 1 else ""
    notes = NOTES.format(averages=averages, rule=f"{RULE}{LIMITS}")
    notes += CONTROLS if any(model.evaluation.control for model in models) else ""
    notes += INTERVALS if any(model.evaluation.retained_interval for model in models) else ""
    return tuple(filter(None, (notes, *(parameter_note(group.first) for group in comparison.unpruned.values()))))


def _open_runs(sweep: SweepResult) -> Iterator[Section]:
    """Yield a report section that lists the runs without a result, with reasons."""
    rows = [
        (printable(entry.run), entry.status, printable(entry.error or ""))
        for entry in sweep.models
        if entry.status != DONE
    ]
    if rows:
        failed = sum(row[1] == FAILED for row in rows)
        table = Table(f"{failed} failed, {len(rows) - failed} pending", ("run", "state", "error"), tuple(rows))
        note = "The same `vlmprune sweep` command runs pending runs, and tries failed runs again."
        yield Section("Runs without a result", tables=(table,), notes=(note,))


def _sections(
    workdir: Path, result: Result | None, plans: Mapping[str, Sequence[str]], finished: bool
) -> Iterator[Section]:
    labels = {} if result is None else result.labels
    if result is not None:
        yield from _comparison_sections(comparison_of_run(result), workdir / "report.png")
    yield from _costs(workdir, result, finished)
    yield from _samples(workdir, labels, finished)
    if result is not None and result.runs:
        groups = tuple(groups_of(result))
        if groups:
            yield Section("By group of questions", tables=groups)
    yield from vocabulary_section(workdir, plans)
    yield from figures.removed_section(workdir, plans)
    yield from figures.importance_section(workdir, plans)
    if result is not None:
        yield from figures.loss_section(workdir, result)
    planned = find_artefact(workdir / TPU_PLAN, TpuPlan)
    if planned is not None and planned.recoveries:
        facts = tuple((printable(name), tuple(recovery.table())) for name, recovery in planned.recoveries.items())
        yield Section("Recovery on a TPU slice", facts=facts, notes=(PLAN_NOTES,))


def _export(result: Result) -> Section:
    if result.export is None:  # a run of a sweep
        missing = f"Nothing is exported, the best model is {result.labels[result.best]}"
        return Section("Export", missing=missing, command="vlmprune export")
    note = (
        f"Exported: {result.export.path} ({result.labels[result.best]}), reloaded and compared: largest difference of "
        f"any logit {result.export.max_abs_logit_difference:.2g}."
    )
    if result.export.moved_by_rounding is not None:
        note += (
            " All scores on this page are of the model before rounding, which moves its logits by at most "
            f"{result.export.moved_by_rounding:.2g}: the model card of the export has the scores after it."
        )
    return Section("Export", notes=(note,))


def _samples(workdir: Path, labels: Mapping[str, str], finished: bool) -> Iterator[Section]:
    """Yield one report section of sample questions per evaluation set."""
    artefact = find_artefact(workdir / SAMPLES, Samples)
    sets = {} if artefact is None else artefact.sets
    title = "Questions and what every model answers"
    if not sets and finished:
        command = COMMAND.format(workdir, "").replace(" run ", " evaluate ")
        yield Section(title, missing="No questions were kept for this page", command=command)
    for name, samples in sets.items():
        shown = tuple(shown_samples(samples, labels))
        if shown:
            notes = () if any(sample.images for _, mine in shown for sample, _ in mine) else ("These have no images.",)
            yield Section(title if len(sets) == 1 else f"{title}: {name}", samples=shown, notes=notes)


def shown_samples(
    samples: SampleSet, labels: Mapping[str, str]
) -> Iterator[tuple[str, list[tuple[Sample, list[tuple[str, str, str]]]]]]:
    """Yield (heading, sample questions with their answers) for each category of samples in an evaluation set.

    An answer is (text, verdict, models that gave it).
    """
    for kind, heading in HEADINGS.items():
        mine = [sample for sample in samples.samples if sample.kind == kind]
        if mine:
            title = f"{heading} ({samples.counts.get(kind, 0):,} of {samples.questions:,})"
            yield title, [(sample, _answers(sample, labels)) for sample in mine]


def _answers(sample: Sample, labels: Mapping[str, str]) -> list[tuple[str, str, str]]:
    models = dict[tuple[str, str], list[str]]()
    for answer in sample.answers:
        if answer.model in labels:
            verdict = "" if answer.score is None else "right" if answer.score >= 0.5 else "wrong"
            models.setdefault((printable(answer.said) or "(nothing)", verdict), []).append(labels[answer.model])
    most = max(models.values(), key=len, default=[])
    if len(models) > 1 and len(most) > MOST_MODELS:
        most[:] = [f"the other {len(most)} models"]
    return [(text, verdict, "; ".join(mine)) for (text, verdict), mine in models.items()]


def vocabulary_section(workdir: Path, plans: Collection[str]) -> Iterator[Section]:
    """Yield a report section on trimmed vocabularies, with one table per plan."""
    tables = []
    for folder in dict.fromkeys((workdir / plan).parent for plan in plans if plan):
        report = find_artefact(folder / VOCABULARY, VocabularyReport)
        if report is not None:
            name = "" if folder == workdir else f"{printable(folder.name)}: "
            title = f"{name}{report.rows:,} of {report.rows_before:,} tokens, {report.parameters:,} parameters fewer"
            rows = list[tuple[str, ...]]()
            for text in report.samples:
                bits = ["" if value is None else f"{value:.3f}" for value in (text.bits_before, text.bits_after)]
                counts = (f"{text.texts:,}", f"{text.equal:,}", f"{100 * text.growth:.2f}", f"{text.broken:,}")
                rows.append((printable(text.name), *counts, *bits))
            tables.append(Table(title, VOCABULARY_HEADER, tuple(rows)))
    if tables:
        yield Section("Vocabulary", tables=tuple(tables), notes=(VOCABULARY_NOTE,))


def _costs(workdir: Path, result: Result | None, finished: bool) -> Iterator[Section]:
    """Yield the report section with measured speed per layer shape, and notes on the costs."""
    measured, tables, notes = find_artefact(workdir / SPEED, Speed), list[Table](), list[str]()
    labels = None if result is None else result.labels
    if result is not None and result.teacher.costs is not None and result.workload is not None:
        workload = result.workload
        notes.append(
            f"FLOPs: a forward pass of {workload.length:,} tokens, those of {workload.images} image(s) among them"
            f"{f', with images at {workload.image_tokens:,} tokens' if workload.image_tokens else ''}; a multiply-add "
            f"is two. Cache and weights as {workload.dtype}."
        )
    if measured is not None:
        tables += speed_tables(measured, labels)
        notes += speed_notes(measured)
    if os.path.lexists(workdir / BENCH):
        bench = read_artefact(workdir / BENCH, Bench)
        tables += bench_tables(bench)
        notes += bench_notes(bench)
    if tables or finished:
        yield Section(
            "Cost and speed",
            notes=tuple(notes),
            tables=tuple(tables),
            missing="" if measured is not None else "Speed was not measured",
            command="" if measured is not None else COMMAND.format(workdir, " --config.speed.rounds=5"),
            folded=False,
        )
