"""The demo's data set: counts, images and complete folders."""

from pathlib import Path

import easy_vqa
import pytest
from refusal import refused

from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.run.demo.easyvqa import single_turn_records, write_dataset


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_dataset(tmp_path_factory.mktemp("data") / "easyvqa")


def test_counts_and_images(paths: dict[str, Path]) -> None:
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
    out = tmp_path / "easyvqa"
    with monkeypatch.context() as patch:
        patch.setattr("vlmprune_jax.run.demo.easyvqa.single_turn_records", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_dataset(out)
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    first = write_dataset(out)
    before = first["train"].stat().st_mtime_ns
    assert write_dataset(out) == first
    assert first["train"].stat().st_mtime_ns == before
    (out / "images/train/7.png").unlink()
    refused("not a complete easy-VQA folder", write_dataset, out)


def test_records_carry_their_split() -> None:
    assert single_turn_records((["q?"], ["yes"], [5]), "test") == [
        {
            "id": "test-000000",
            "image": "test/5.png",
            "conversations": [{"from": "human", "value": "<image>\nq?"}, {"from": "gpt", "value": "yes"}],
        }
    ]
