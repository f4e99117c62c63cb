"""Benchmarks at a tiny size: they check by themselves that both sides compute the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lines_of(benchmark, *flags):
    """The lines of JSON that a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / benchmark), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_training_benchmark_runs(tmp_path):
    flags = ["--tiny", "--batch=2x24", "--rounds=2", f"--work={tmp_path}"]
    ours, peft, ratios = lines_of("train_step.py", *flags)
    assert [line["side"] for line in (ours, peft, ratios)] == ["ours", "peft", "ours/peft"]
    for line in (ours, peft):
        assert line["tokens_per_second"] == pytest.approx(2 * 24 / line["step_seconds"], rel=0.2)  # rounded to 1 ms
        assert 0.1 < line["peak_rss_gib"] < 2
    assert ratios["tokens_per_second"] == pytest.approx(ours["tokens_per_second"] / peft["tokens_per_second"], rel=0.01)


@pytest.mark.slow
def test_the_scoring_benchmark_runs():
    lines = lines_of("scoring.py", "--tiny", "--batch=4x24", "--rounds=2")
    assert [line["side"] for line in lines] == ["ours", "torch", "ratio"] * 2
    for line in lines[2::3]:
        assert line["speed"] > 0
        assert 0.05 < line["memory"] < 5


@pytest.mark.slow
def test_recommendations_land_in_their_interval(tmp_path):
    """Each is followed to the end: pruned, recovered as advised, and evaluated on the demo's questions."""
    rows = [row for row in lines_of("recommend_check.py", f"--workdir={tmp_path / 'checks'}") if "case" in row]
    assert [row["case"] for row in rows if row["inside"]] == ["trained", "untrained", "hybrid", "projector"], rows


@pytest.mark.slow
def test_the_benchmark_of_full_size_runs(tmp_path):
    found = lines_of("full_size.py", "--tiny", "--model=internvl", f"--work={tmp_path}")
    lines = {line["step"]: line for line in found}
    assert list(lines) == ["cp_input", "cat", "read", "load", "inspect", "depth", "cp_output", "width", "ratios"]
    assert lines["cp_input"]["output_bytes"] == lines["cp_input"]["input_bytes"]
    assert lines["cp_output"]["output_bytes"] == lines["depth"]["output_bytes"] < lines["depth"]["input_bytes"]
    assert lines["width"]["output_bytes"] < lines["depth"]["input_bytes"]
    assert 0.05 < lines["depth"]["peak_rss_gib"] < 1
    assert lines["ratios"]["depth_to_cp_of_input_and_output"] > 0
    assert list(tmp_path.iterdir()) == []
