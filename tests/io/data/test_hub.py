"""Data sets of the hub by name: the package datasets reads a local folder in its place, or a stand-in is asked."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets_cases import write_split
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.datasets import datasets_source, fetch_dataset
from vlmprune_jax.io.data.inputs import name_of_records
from vlmprune_jax.run.cli.config_files import experiment_config, placed, read_experiment

ROWS = [{"question": f"How many, {number}?", "answer": str(number)} for number in range(5)]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What load_dataset is asked for; its rows are `ROWS`."""
    calls = []

    class Rows(list):
        features = None

        def take(self, number):
            return Rows(self[:number])

        def save_to_disk(self, folder):
            write_split(Path(folder), self, ())

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "org/lost":
            raise ConnectionError("Couldn't reach the Hub")
        return Rows(ROWS)

    module = SimpleNamespace(
        load_dataset=load_dataset, Dataset=SimpleNamespace(from_list=lambda rows, features: Rows(rows))
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_set_is_stored_once_in_the_workdir(asked, tmp_path):
    config = experiment_config()
    config.data.train, config.data.eval = "hub:org/name:train", "hub:org/name/sub:test[:2]"
    config.evaluate.sets = {"short": {"data": "hub:org/name/sub:test[:2]"}, "text": {"text": "a.txt"}}
    found = placed(read_experiment(config), tmp_path / "w", dry_run=True).data
    assert len(datasets_source(found.train).read()) == len(ROWS)
    assert not (tmp_path / "w").exists()
    asked.clear()
    for _ in range(2):
        experiment = placed(read_experiment(config), tmp_path / "w")
    data = experiment.data
    assert placed(read_experiment(config), tmp_path / "w", dry_run=True).data == data
    assert experiment.evaluate.sets["short"].data == data.eval
    assert asked == [("org/name", None, "train", False), ("org/name", "sub", "test", True)]
    train, test = (datasets_source(text).read() for text in (data.train, data.eval))
    assert [record.turns[0][1] for record in train] == [row["question"] for row in ROWS]
    assert [record.references for record in test] == [("0",), ("1",)]
    assert name_of_records(data.train) == "org/name"
    assert name_of_records("DIR/mix665k.json") == "mix665k.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub:name", r"data\.train=hub:name: expected hub:ORG/NAME:SPLIT, as hub:"),
        (
            "hub:org/lost:train",
            r"data\.train=hub:org/lost:train: not available from the hub \(Couldn't reach the Hub\): check",
        ),
    ],
)
def test_what_is_not_there(asked, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        fetch_dataset(text, tmp_path / "data", "data.train")
    assert not (tmp_path / "data").exists()


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'vlmprune-jax\[hub\]'"):
        fetch_dataset("hub:org/name:train", tmp_path, "data.train")


def test_the_package_itself(monkeypatch, tmp_path):
    """It takes a folder of that name for the hub's."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -e '.[hub]'")
    monkeypatch.chdir(tmp_path)
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(5)]
    rows = [{**row, "image": image} for row, image in zip(ROWS, images, strict=True)]
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet("org/name/train.parquet")
    for text, count in (("hub:org/name:train", 5), ("hub:org/name:train[:2]", 2)):
        records = datasets_source(fetch_dataset(text, tmp_path / "data", "data.train")).read()
        assert [record.turns[0][1] for record in records] == [f"<image>\n{row['question']}" for row in ROWS[:count]]
        assert all(record.images[0].read_bytes().startswith(b"\x89PNG") for record in records)
    with pytest.raises(UserError, match=r"hub:org/other:train: not available from the hub .*: check name, split and"):
        fetch_dataset("hub:org/other:train", tmp_path, "data.train")
