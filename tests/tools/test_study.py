"""What a sweep says of the paper's insights: verdicts, pairs and intervals of sweeps made by hand."""

import dataclasses
import itertools
import math
import re

import numpy as np
import PIL.Image
import pytest
import study as study_script
from expert_study import summary
from insights import conclude
from msgspec.structs import replace
from repository import ROOT
from study_cases import changed, row, rows, sweep, write_sweep
from study_guide import evidence_of
from study_page import BEGIN, END, as_markdown, study_figure
from sweep_points import Point, points_of

from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.planning.guide import FILE, read_guide
from vlmprune_jax.run.workdir.result import ModelEvaluation


def concluded(models):
    """Number of an insight ("2a") -> what is concluded of it."""
    return {one.claim.split(".")[0]: one for one in conclude(points_of(sweep(models)))}


def verdicts(conclusion):
    return [one.verdict for one in conclusion.comparisons]


def test_some_insights_hold_and_some_do_not():
    found = concluded(rows())
    assert {name: one.verdict for name, one in found.items()} == {
        "1": "by setting",
        "2a": "holds",
        "2b": "does not hold",
        "3": "holds",
        "4a": "by setting",
        "4b": "undecided",  # SFT is ahead of it with two seeds of three
        "4c": "undecided",  # no runs
        "5a": "by setting",
        "5b": "holds",
        "6a": "equal within 1 point",
        "6b": "equal within 1 point",
        "7": "undecided",
    }
    assert verdicts(found["5a"]) == ["holds", "holds", "does not hold", "does not hold"]
    assert verdicts(found["1"]) == ["does not hold", "holds"]
    assert [round(one.effect.mean, 6) for one in found["1"].comparisons] == [-10.0, 20.0]
    assert {one.pairs for one in found["1"].comparisons} == {3}
    assert (found["1"].effect.mean, found["1"].effect.seeds) == (pytest.approx(5.0), 3)
    replaced = {one.setting: round(one.effect.mean, 6) for one in found["6a"].comparisons}
    assert replaced["width 45 %, 5 % of the data"] == 0.0  # half-way exactly
    assert replaced["width 45 %, 100 % of the data"] == -0.5
    assert [round(one.effect.mean, 6) for one in found["6b"].comparisons] == [0.5] * 4
    assert found["3"].comparisons[0].setting == "depth 15 %, 5 % of the data"


def test_an_effect_in_one_noisy_setting_is_found():
    """One setting of eight has an effect and ten times the noise: neither its mean nor its verdict is of the others."""
    draw, found, wrong = np.random.default_rng(0), 0, 0
    for effect in (15.0, 0.0):
        for _ in range(60):
            points = []
            for place, seed in itertools.product(range(8), range(6)):
                noisy = place == 7
                added = draw.normal(effect if noisy else 0.0, 5.0 if noisy else 0.5)
                for recovery, retained in (("sft_l2", 70.0), ("reconstruct+sft_l2", 70.0 + added)):
                    one = ("model", 1, "width", recovery, 0.1 * place, 0.1 * place, 0.05, seed, retained, None)
                    points.append(Point(*one))
            (claim,) = [one for one in conclude(points) if one.claim.startswith("6b")]
            last = claim.comparisons[-1]
            mean, low, high = interval_of_mean([p.retained - 70.0 for p in points if p.level == 0.1 * 7][1::2])
            assert (last.effect.mean, *last.effect.interval) == pytest.approx((mean, low, high))
            if effect:
                found += (claim.verdict, verdicts(claim)[-1]) == ("by setting", "holds")
            else:
                wrong += claim.verdict not in ("undecided", "equal within 1 point")
    assert found >= 0.9 * 60
    assert wrong <= 0.15 * 60


def test_retention_of_the_control_is_a_claim_of_its_own():
    models = [row("depth", 0.15, "sft_l2", 99.0, data=0.05, seed=seed) for seed in range(4)]
    for seed, model in enumerate(models):
        control = ModelEvaluation(scores={}, mean_of_ratios=97.0 + 0.1 * seed)
        models[seed] = changed(model, evaluation=replace(model.found.evaluation, control=control))
    found = concluded(models)["7"]
    assert (found.verdict, found.effect.mean) == ("does not hold", pytest.approx(97.15))
    (one, *_) = evidence_of("mine", points_of(sweep(models)))
    assert (one.retained, one.of_control) == (99.0, 97.15)


def test_without_rows_nothing_can_be_said():
    for one in concluded([]).values():
        assert (one.verdict, one.comparisons) == ("undecided", ())
    alone = concluded([model for model in rows() if model.seed == 0])  # one pair has no interval
    assert {one.verdict for one in alone.values()} == {"undecided"}
    (silent,) = [line for line in as_markdown("mine", sweep([])).splitlines() if "does not test" in line]
    assert silent.startswith("Claims that this sweep does not test: 1, 2a, ")
    assert silent.count(",") == len(alone) - 1
    assert alone["1"].comparisons[0].effect.mean == pytest.approx(-10.0)


def test_pairs_differ_in_nothing_else():
    other = [row("depth", 0.15, "none", 50.0), row("width", 0.15, "none", 60.0, seed=1)]
    assert concluded(other)["1"].comparisons == ()
    model = [row("depth", 0.15, "none", 50.0), row("width", 0.15, "none", 60.0, model="models/other")]
    assert concluded(model)["1"].comparisons == ()
    data = [row("width", 0.15, "sft_l2", 60.0, data=0.2), row("depth", 0.15, "sft_l2", 50.0, data=0.05)]
    assert concluded(data)["2a"].comparisons == ()


def test_what_was_not_trained_is_a_partner_for_any_seed():
    plain = [row("depth", 0.15, "none", 90.0, seed=None), row("depth", 0.15, "none", 95.0, seed=None, solved=True)]
    trained = [row("depth", 0.15, "sft_l2", 98.0, data=0.05, seed=seed) for seed in range(3)]
    (found,) = concluded(plain + trained)["6a"].comparisons
    assert (found.pairs, found.effect.mean) == (3, 95 - (90 + 98) / 2)


def test_what_is_left_out():
    """Runs that failed, models without an average, and criteria that the paper does not prune by."""
    whole = [row("depth", 0.15, "none", 50.0)]
    failed = replace(whole[0], found=None, error="stopped")
    no_average = changed(whole[0], evaluation=replace(whole[0].found.evaluation, mean_of_ratios=None))
    models = [failed, no_average, row("width", 0.15, "none", 50.0, criterion="l1")]
    assert points_of(replace(sweep(whole), models=models)) == []
    (point,) = points_of(sweep(whole))
    assert (point.level, point.reached, point.recovery, point.interval) == (0.15, 0.16, "none", (48.0, 52.0))
    (of_layers,) = points_of(sweep([changed(whole[0], target_ratio=None)]))
    assert of_layers.level == 0.16


def test_little_to_win_back_is_no_share():
    models = [
        row("width", 0.15, "none", 99.5),
        row("width", 0.15, "none", 99.9, solved=True),
        row("width", 0.15, "sft_l2", 100.0, data=0.05),
    ]
    assert concluded(models)["6a"].comparisons == ()
    models[0] = row("width", 0.15, "none", 99.0)
    assert concluded(models)["6a"].comparisons[0].effect.mean == pytest.approx(99.9 - 99.5)


def test_rows_for_the_guide():
    found = evidence_of("mine", points_of(sweep(rows())))
    (one,) = [
        r for r in found if (r.method, r.recovery, r.decoder_ratio, r.data_fraction) == ("width", "none", 0.16, 0)
    ]
    assert (one.source, one.model, one.retained, one.seeds) == ("mine", "teacher, 1.06 M", 80.1, 3)
    assert one.parameters == 1_060_000
    assert one.interval == pytest.approx((80.1 - math.hypot(0.248, 2), 80.1 + math.hypot(0.248, 2)), abs=0.005)
    (alone,) = evidence_of("mine", points_of(sweep([row("depth", 0.15, "none", 50.0)])))
    assert (alone.interval, alone.seeds) == ((48.0, 52.0), 1)
    (other,) = evidence_of("mine", points_of(sweep([row("depth", 0.15, "none", 50.0, model="runs/2/teacher")])))
    assert other.model == "teacher, 135 M"


# --- the command -----------------------------------------------------------------------------------------------------


ROW = "|1|15 %|3|-10.00 (-10.00 to -10.00)|<0.001|1.000|does not hold|\n"


@pytest.fixture
def study(tmp_path):
    return write_sweep(tmp_path / "sweep", rows())


def failing(capsys, *argv):
    assert main(argv, study_script) == 2
    return capsys.readouterr().err


def test_the_command_prints_conclusions(capsys, study):
    assert main([f"mine={study}"], study_script) == 0
    out = capsys.readouterr().out
    assert "### mine\n\n" in out
    assert "|2a|15 %|3|" in out
    assert ROW in out
    effect = "width minus depth: from -10.00 to 20.00|3|2|6|100 %|<0.001||"
    assert f"|{effect}by setting (next table)|\n" in out
    assert "|decoder removed|without recovery|reconstructed|SFT, 5 %|" in out
    assert "|undecided|\n" in out


def test_a_page_and_a_guide_take_rows(tmp_path, study, capsys):
    page, guide = tmp_path / "study.md", tmp_path / "guide.json"
    page.write_text(f"# Study\n\n{BEGIN}\noutdated\n\n### other\n\nstays\n\n{END}\n\nafter\n")
    for _ in range(2):  # again: in place of what was there
        assert main([f"mine={study}", f"--page={page}", f"--guide={guide}"], study_script) == 0
    text = page.read_text()
    assert "![Plot of retained score (%) against removed decoder parameters (%), mine](mine.png)" in text
    with PIL.Image.open(tmp_path / "mine.png") as image:
        assert image.size[0] > 800
    assert text.startswith(f"# Study\n\n{BEGIN}\n\n### other\n\nstays\n\n### mine\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "outdated" not in text
    assert text.count("### mine") == 1
    assert (ROW in text, "|2a|15" in text) == (True, False)  # settings of claims that they decide
    ours, theirs = read_guide(guide), read_guide(FILE)
    added = [one for one in ours.evidence if one.source == "mine"]
    assert len(added) == len(evidence_of("mine", points_of(sweep(rows()))))
    assert [one for one in ours.evidence if one.source != "mine"] == list(theirs.evidence)
    assert ours.sources["mine"].vision
    assert dataclasses.replace(ours, sources={}, evidence=()) == dataclasses.replace(theirs, sources={}, evidence=())


def test_what_a_study_cannot_be(capsys, tmp_path, study):
    assert "no sweep given" in failing(capsys)
    assert "must be NAME=SWEEP_DIR" in failing(capsys, str(study))
    assert "'paper' is taken" in failing(capsys, f"paper={study}")
    assert "'a' is taken" in failing(capsys, f"a={study}", f"a={study}")
    assert "sweep.json" in failing(capsys, f"a={tmp_path / 'nowhere'}")
    (tmp_path / "page.md").write_text("# Study\n")
    assert "has no lines <!-- vlmprune study: begin -->" in failing(
        capsys, f"a={study}", f"--page={tmp_path / 'page.md'}"
    )
    (tmp_path / "guide.json").write_text("{}")
    assert "guide.json: does not have the expected content" in failing(
        capsys, f"a={study}", f"--guide={tmp_path / 'guide.json'}"
    )
    assert (tmp_path / "guide.json").read_text() == "{}"


def test_names_are_text_and_no_markup():
    evil = "a|b\n# c <img src=x> [d](http://e)"
    rows = [row("depth", 0.15, "none", 90.0, model=evil), row("depth", 0.15, evil, 90.0), row("width", 0.45, "none", 9)]
    found = sweep(rows)
    found.unpruned[evil] = found.unpruned["models/teacher"]
    found = replace(found, sets={evil: replace(found.sets["questions"], name=evil, main="perplexity", full=None)})
    for model in (*found.done, *found.unpruned.values()):
        model.evaluation.scores[evil] = {"perplexity": 3.0}
    text = as_markdown("study", found)
    assert "perplexity on a" in text
    assert not re.search(r"(?<!\\)[<\[]|^# |[^\\|\n-]\|b", text, re.M)


def test_perplexities_stand_in_a_table_over_seeds():
    def text(model, value):
        scores = {**model.found.evaluation.scores, "text": {"perplexity": value}}
        return changed(model, evaluation=replace(model.found.evaluation, scores=scores))

    plain = [text(row("depth", 0.15, "none", 90.0, seed=seed), value) for seed, value in enumerate((20.0, 80.0))]
    trained = [text(row("depth", 0.15, "sft_l2", 95.0, data=0.05, seed=0, solved=True), 60.0)]
    found = sweep([*plain, *trained, row("width", 0.45, "none", 60.0)])
    assert "perplexity" not in as_markdown("study", found)
    # A metric without a full score: averages leave it out.
    of_text = replace(found.sets["questions"], name="perplexity", main="perplexity", full=None)
    found = replace(found, sets={**found.sets, "text": of_text})
    found.unpruned["models/teacher"].evaluation.scores["text"] = {"perplexity": 10.0}
    assert "\nThe 4 runs (2 seeds, 4 different models) are scored by accuracy on questions.\n" in as_markdown(
        "study", found
    )
    found.models.append(text(row("width", 0.45, "none", 60.0), 1e6))
    found.models.append(text(row("width", 0.45, "none", 60.0, solved=True), 600.0))
    table = as_markdown("study", found).split("(number of seeds/different models; unpruned: 10.00):")[1].split("\n")
    assert table[2:] == [
        "|method, criterion, decoder removed|without recovery|reconstructed|reconstructed + SFT + L2, 5 %|",
        "|---|---|---|---|",
        "|depth, block_influence, 16.0 %|40.00 (2/2)||60.00 (1/1)|",
        "|width, taylor, 46.0 %|1,000,000 (1/1)|600.00 (1/1)||",
        "",
    ]


@pytest.mark.parametrize(
    ("changes", "titles", "lines"),
    [
        ({}, ["depth", "width"], {"without recovery", "reconstructed", "SFT + L2, 5 %"}),
        ({"criterion": "random"}, ["depth, without recovery", "depth, reconstructed"], {"block_influence", "random"}),
    ],
)
def test_a_figure_has_a_line_for_what_is_compared(changes, titles, lines):
    models = rows()
    if changes:
        models = [one for one in models if not one.found.data_fraction and one.found.method == "depth"]
        models += [replace(changed(one, **changes), name=f"{one.name}x", group=f"{one.group}x") for one in models]
    figure = study_figure(sweep(models))
    assert [axes.get_title("left") for axes in figure.axes] == titles
    assert lines <= {text.get_text() for text in figure.legends[0].get_texts()}
    assert study_figure(sweep(one for one in models if one.found.decoder_ratio < 0.2)) is None


def test_a_figure_where_layers_were_counted():
    """Ratios are the axis, not lines, also where none was asked for."""
    models = []
    for level, retained in ((0.15, 90.0), (0.45, 40.0)):
        one = row("depth", level, "none", retained)
        models.append(replace(changed(one, target_ratio=None), labels={**one.labels, "ratio": f"{level}"}))
    figure = study_figure(sweep(models))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["without recovery"]
    assert [axes.get_title("left") for axes in figure.axes] == ["depth"]


def test_a_band_ends_before_a_place_of_two_seeds():
    seeds = {0.15: 3, 0.3: 3, 0.45: 2}
    models = [row("depth", level, "none", 90.0 + seed, seed=seed) for level in seeds for seed in range(seeds[level])]
    figure = study_figure(sweep(models))
    (axes,) = figure.axes
    (band,) = axes.collections
    assert axes.lines[-1].get_xdata().max() == pytest.approx(46.0)
    assert max(path.vertices[:, 0].max() for path in band.get_paths()) == pytest.approx(31.0)


def test_results_of_experts_are_printed_from_their_data(capsys):
    summary(ROOT / "docs/explanation/data/study_experts.jsonl.xz")
    assert capsys.readouterr().out in (ROOT / "docs/explanation/results.md").read_text(encoding="utf-8")
