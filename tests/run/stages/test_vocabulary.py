"""A trimmed vocabulary through the commands: scores, plan, report, reconstruction, distillation, evaluation, export."""

import dataclasses

import numpy as np
import pytest
from experiment_cases import record, write_experiment
from rounding import assert_same_function, double_logits
from scipy.special import log_softmax
from vocabulary_cases import TOPICS, texts_file, tokenized_folder

import vlmprune_jax as vp
from vlmprune_jax.core.prune.surgery import trim_vocabulary
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.report.build import vocabulary_section
from vlmprune_jax.run.stages.vocabulary import _by_script
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.evaluation import read_evaluated
from vlmprune_jax.run.workdir.result import read_result
from vlmprune_jax.run.workdir.vocabulary import VocabularyReport


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    root = tmp_path_factory.mktemp("vocabulary")
    (root / "text.txt").write_text(TOPICS[1][:400])
    sources = texts_file(root / "sources.json", [TOPICS[2][i * 100 : (i + 1) * 100] for i in range(30)])
    write_experiment(
        root, goldens, [record(f"r{i}", None, TOPICS[i][:60], "yes") for i in range(8)],
        tokenized_folder(root / "teacher", "llama"),
        data={"eval": f"{root}/records.json", "images": None, "template": "llava_v1", "max_length": 128},
        score={"depth": "random", "samples": 2},
        prune={"layers_removed": 1, "vocabulary": {"size": 448, "sources": [str(sources)], "multiple": 8}},
        reconstruct={"method": "least_squares", "samples": 8},
        recover={"trainable": "decoder", "control": False, "batch_size": 2, "steps": 2, "learning_rate": 1e-2,
                 "losses": {"ce": 0.5, "kl": 0.5}},
        evaluate={"text": f"{root}/text.txt", "text_window": 32, "max_new_tokens": 4},
    )  # fmt: skip
    return root


def run(root, command, workdir="w", *more, code=0):
    flags = [f"--config={root / 'experiment.yaml'}", f"--workdir={root / workdir}"]
    assert main([command, *flags, *more]) == code


def test_prune_reports_held_out_texts(root, capsys):
    run(root, "score")
    run(root, "prune")
    said = capsys.readouterr().out
    assert "vocabulary: 448 of 640 tokens" in said
    assert "on 3 held-out texts:" in said
    report = read_artefact(root / "w/vocabulary.json", VocabularyReport)
    assert (report.rows_before, report.rows) == (640, 448)
    sample = report.samples[0]
    assert (sample.texts, sample.broken, sample.measured_bytes) == (3, 0, 300)
    assert sample.tokens_after >= sample.tokens_before
    assert sample.bits_before > 0 < sample.bits_after
    (section,) = vocabulary_section(root / "w", ["plan.json"])
    assert section.tables[0].rows[0][:2] == ("all", "3")
    run(root, "prune")
    assert "prune: unchanged, skipped" in capsys.readouterr().out
    texts_file(root / "sources.json", [TOPICS[4][i * 100 : (i + 1) * 100] for i in range(30)])
    run(root, "prune", code=2)
    assert "prune.vocabulary" in capsys.readouterr().err


def test_a_vocabulary_alone_needs_no_scores(root, capsys):
    run(root, "score", "alone", "--config.prune.layers_removed=None", code=2)
    assert "only the vocabulary is trimmed, so no scores are needed: run `vlmprune prune`" in capsys.readouterr().err
    run(root, "prune", "alone", "--config.prune.layers_removed=None")
    assert not list((root / "alone").glob("scores*"))
    plan = vp.PrunePlan.from_json(root / "alone/plan.json")
    teacher, pruned = vp.load(root / "teacher"), vp.load(root / "alone/pruned")
    assert (plan.method, plan.target_ratio, plan.removed_layers) == ("vocabulary", None, ())
    assert pruned.cfg == plan.apply_to(teacher.cfg)
    tokens = {"size": 448, "sources": (str(root / "sources.json"),), "multiple": 8, "source_dir": str(root / "teacher")}
    assert vp.make_plan(None, teacher, vocabulary=tokens).vocabulary == plan.vocabulary
    for model, options in ((teacher.cfg, {"vocabulary": tokens}), (teacher, {"ratio": 0.1})):
        with pytest.raises(vp.UserError, match="scores=None needs the model, and is allowed only if"):
            vp.make_plan(None, model, **options)
    with pytest.raises(vp.UserError, match="text/vocab has 640 units in the plan, but 448 in this model"):
        vp.apply_plan(pruned, plan)
    capsys.readouterr()
    whole = dataclasses.replace(plan, kept={}, tokenizer=None)
    whole.to_json(root / "whole.json")
    assert main(["diff", str(root / "alone"), str(root / "whole.json")]) == 0
    said = capsys.readouterr().out
    assert "448 / 640" in said
    assert "70.0 %" in said


@pytest.mark.slow
def test_the_whole_run(root):
    run(root, "run", "whole")
    work, plan = root / "whole", vp.PrunePlan.from_json(root / "whole/plan.json")
    for name in ("pruned", "reconstructed", "recovered", "export"):
        model = vp.load(work / name)
        assert model.cfg == plan.apply_to(vp.load(root / "teacher").cfg)
        assert len(load_tokenizer(work / name)) <= 448
    values = read_evaluated(work / "eval/recovered.text.json").values
    whole = read_evaluated(work / "eval/teacher.text.json")
    retained = read_result(work).runs[-1].evaluation.retained["text"]
    assert retained == pytest.approx(100 * whole.values["bits_per_byte"] / values["bits_per_byte"])


@pytest.mark.slow
def test_a_cache_belongs_to_one_vocabulary(root, capsys):
    """The teacher's cached logits have the ids of the kept tokens."""
    cached = ["--config.recover.losses.teacher_inputs=own", f"--config.recover.teacher_cache={root / 'cache'}"]
    cached += ["--config.recover.teacher_top_k=4", "--config.reconstruct.method=none"]
    for stage in ("score", "prune", "recover"):
        run(root, stage, "cached", *cached)
    other = [*cached, "--config.prune.vocabulary.size=456"]
    for stage in ("score", "prune"):
        run(root, stage, "other", *other)
    run(root, "recover", "other", *other, code=2)
    assert "prune.vocabulary" in capsys.readouterr().err


def test_the_teacher_is_renormalised_over_the_kept_tokens(root):
    """Its log-probabilities of kept tokens, gathered and renormalised, are those of the trimmed teacher."""
    teacher, plan = vp.load(root / "teacher"), vp.PrunePlan.from_json(root / "w/plan.json")
    kept = np.array(plan.vocabulary.kept)
    rows = np.array([[5, 300, 17, 440]])
    gathered = double_logits(teacher, input_ids=kept[rows])[..., kept]
    trimmed = double_logits(trim_vocabulary(teacher, plan.vocabulary), input_ids=rows)
    renormalised = gathered - np.log(np.exp(gathered).sum(-1, keepdims=True))
    assert_same_function(log_softmax(trimmed, -1), renormalised)


def test_texts_by_script():
    groups = _by_script(["abc", "где кот", "def 12", "123"])
    assert [(name, len(texts)) for name, texts in groups] == [("Latin", 2), ("Cyrillic", 1), ("Other", 1)]
