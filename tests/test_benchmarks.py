"""Benchmarks at a tiny size: they check by themselves that both sides compute the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_training_benchmark_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/train_step.py"), "--tiny", "--batch=2x24", "--rounds=2"]
    done = subprocess.run([*command, f"--work={tmp_path}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, peft, ratios = map(json.loads, done.stdout.splitlines())
    assert [line["side"] for line in (ours, peft, ratios)] == ["ours", "peft", "ours/peft"]
    for line in (ours, peft):
        assert line["tokens_per_second"] == pytest.approx(2 * 24 / line["step_seconds"], rel=0.2)  # rounded to 1 ms
        assert 0.1 < line["peak_rss_gib"] < 2
    assert ratios["tokens_per_second"] == pytest.approx(ours["tokens_per_second"] / peft["tokens_per_second"], rel=0.01)


@pytest.mark.slow
def test_the_scoring_benchmark_runs():
    command = [sys.executable, str(ROOT / "benchmarks/scoring.py"), "--tiny", "--batch=4x24", "--rounds=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["side"] for line in lines] == ["ours", "torch", "ratio"] * 2
    for line in lines[2::3]:
        assert line["speed"] > 0
        assert 0.05 < line["memory"] < 5


@pytest.mark.slow
def test_recommendations_land_in_their_interval(tmp_path):
    """Each is followed to the end: pruned, recovered as advised, and evaluated on the demo's questions."""
    command = [sys.executable, str(ROOT / "benchmarks/recommend_check.py"), f"--workdir={tmp_path / 'checks'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert [row["case"] for row in rows if row["inside"]] == ["trained", "untrained", "hybrid", "projector"], rows
