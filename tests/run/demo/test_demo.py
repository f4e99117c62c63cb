"""The bundled teacher and one recovered model of the demo reach the numbers of the README."""

import json
import subprocess
import sys
from pathlib import Path

import easy_vqa
import pytest
from refusal import refused

from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.demo import easyvqa
from vlmprune_jax.run.demo.easyvqa import write_dataset
from vlmprune_jax.run.workdir.result import read_result


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_demo_reaches_its_numbers(tmp_path, capsys):
    """The teacher answers >= 99 % of all 9,673 questions. Pruned in depth it is worse, in width by three quarters of
    the answers, four fifths of which reconstruction wins back; trained with SFT + L2 on 5 % of the data the model with
    fewer layers retains >= 99 % of the teacher's. The demo's control and its other arms would take many more minutes.
    """
    config = tmp_path / "demo.py"
    config.write_text("""
from vlmprune_jax.run.cli.config_files import shipped_config


def get_config():
    config = shipped_config("demo")
    config.prune_variants.width_reconstructed.recover = {"method": "none"}
    config.recover.control = False
    config.speed.rounds = 1
    return config
""")
    assert main(["run", f"--config={config}", f"--workdir={tmp_path / 'w'}"]) == 0, capsys.readouterr().err
    result = read_result(tmp_path / "w")
    assert result.sets["questions"].size == "9,673 questions"
    assert result.teacher.evaluation.scores["questions"]["accuracy"] >= 0.99
    runs = {run.name: run for run in result.runs}
    retained = {name: run.evaluation.retained["questions"] for name, run in runs.items()}
    for name, (low, high) in {"depth": (95, 98), "width_reconstructed": (20, 32)}.items():
        assert low < retained[name] < high
        assert 0.54 < runs[name].decoder_ratio < 0.58
    assert retained["depth-sft_l2"] >= 99
    assert runs["depth-sft_l2"].data_fraction == 0.05
    assert 82 < retained["width_reconstructed-reconstructed"] < 91
    assert result.best == "depth-sft_l2"
    assert result.export.max_abs_logit_difference < 1e-4


def test_runs_of_a_sweep_may_write_their_texts_at_the_same_time(tmp_path):
    code = (
        "import sys, pathlib; from vlmprune_jax.run.demo.topics import write_shared\n"
        "for _ in range(300): write_shared(pathlib.Path(sys.argv[1]), 'text' * 9999)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "text.txt"]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


# --- the demo's data set ---------------------------------------------------------------------------------------------


def test_counts_and_images(tmp_path: Path) -> None:
    paths = write_dataset(tmp_path / "easyvqa")
    train, test = read_records(paths["train"], paths["images"]), read_records(paths["test"], paths["images"])
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({record.images for record in train}) == 4_000
    assert len({record.images for record in test}) == 1_000
    assert train[123].id == "train-000123"
    assert len({record.id for record in train + test}) == 48_248
    questions, answers, images = easy_vqa.get_test_questions()
    for number in (0, 4_000, 9_672):
        turns = (("human", f"<image>\n{questions[number]}"), ("gpt", answers[number]))
        assert test[number] == Record(
            f"test-{number:06d}", turns, (paths["images"] / "test" / f"{images[number]}.png",)
        )
        original = easy_vqa.get_test_image_paths()[images[number]]
        assert test[number].images[0].read_bytes() == Path(original).read_bytes()


def test_folder_is_kept_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first questions and images of the package; its records carry their split."""
    out, images = tmp_path / "easyvqa", easy_vqa.get_test_image_paths()
    few = {number: images[number] for number in range(8)}
    for split in ("train", "test"):
        monkeypatch.setattr(easy_vqa, f"get_{split}_questions", lambda: (["q?"], ["yes"], [5]))
        monkeypatch.setattr(easy_vqa, f"get_{split}_image_paths", lambda: few)
        monkeypatch.setitem(easyvqa.QUESTION_COUNTS, split, 1)
        monkeypatch.setitem(easyvqa.IMAGE_COUNTS, split, len(few))
    with monkeypatch.context() as patch:
        patch.setattr(easyvqa, "single_turn_records", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_dataset(out)
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    first = write_dataset(out)
    turns = [{"from": "human", "value": "<image>\nq?"}, {"from": "gpt", "value": "yes"}]
    (only,) = json.loads(first["test"].read_text())
    assert only == {"id": "test-000000", "image": "test/5.png", "conversations": turns}
    before = first["train"].stat().st_mtime_ns
    assert write_dataset(out) == first
    assert first["train"].stat().st_mtime_ns == before
    (out / "images/train/7.png").unlink()
    refused("not a complete easy-VQA folder", write_dataset, out)
    monkeypatch.setitem(easyvqa.IMAGE_COUNTS, "test", 9)
    told = r"test: found \(1, 8\) questions and images, expected \(1, 9\): install easy-vqa 1.0"
    refused(told, write_dataset, tmp_path / "other")
