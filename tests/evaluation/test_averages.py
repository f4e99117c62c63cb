"""What pruning retained: both averages, against the paper's tables."""

import math

import numpy as np
import pytest

from vlmprune_jax.errors import UserError
from vlmprune_jax.evaluation.averages import mean_of_ratios, paper_average, retained

BENCHMARKS = ("MMMU", "SQA", "MathV", "AI2D", "MME-C", "MME-P", "POPE", "DocVQA", "GQA")
# The project page's tables of arXiv 2604.24380: the unpruned row, then rows of nine scores and the AVG-% beside them.
TABLES = {
    "llava": (
        (35.10, 68.67, 26.70, 54.80, 363.21, 1511.33, 86.99, 28.10, 61.98),
        [
            ((32.40, 63.21, 23.10, 45.40, 268.93, 1432.47, 86.57, 23.90, 59.34), 90.87),
            ((31.00, 54.29, 15.80, 37.80, 253.21, 1174.93, 86.29, 17.90, 52.59), 79.88),
            ((32.70, 59.64, 14.80, 32.10, 210.71, 921.88, 78.69, 16.50, 42.18), 72.22),
            ((31.80, 55.23, 13.50, 29.70, 202.14, 701.83, 86.38, 14.60, 42.77), 69.18),
            ((36.40, 68.42, 25.50, 53.70, 337.86, 1442.35, 86.94, 27.60, 61.20), 98.10),
            ((36.00, 68.82, 23.40, 50.50, 318.57, 1496.60, 85.98, 26.10, 60.34), 96.38),
            ((30.80, 52.92, 20.20, 48.40, 215.00, 1191.17, 85.74, 23.70, 57.74), 83.99),
            ((27.70, 46.26, 18.00, 46.30, 211.79, 1085.97, 84.06, 22.20, 52.32), 78.13),
        ],
    ),
    "internvl": (
        (43.20, 93.30, 53.70, 76.90, 547.50, 1596.71, 88.00, 87.70, 62.57),
        [
            ((42.70, 92.96, 38.80, 72.40, 527.86, 1594.37, 88.09, 80.20, 58.43), 94.74),
            ((33.30, 68.82, 28.80, 44.50, 397.14, 1300.60, 85.20, 64.20, 42.39), 73.72),
            ((43.60, 93.12, 22.50, 70.20, 510.10, 1588.30, 88.15, 78.30, 52.35), 90.48),
            ((28.30, 62.82, 18.40, 24.50, 220.90, 1200.60, 73.20, 53.10, 27.39), 57.42),
        ],
    ),
    "internvl, second table": (
        (43.20, 93.30, 53.70, 76.90, 547.50, 1596.71, 88.00, 87.70, 62.50),
        [
            ((42.80, 92.47, 53.22, 76.21, 542.61, 1582.42, 87.21, 86.92, 62.01), 99.12),
            ((41.45, 89.53, 51.53, 73.79, 525.36, 1532.14, 84.44, 84.15, 60.04), 95.96),
            ((37.24, 80.43, 46.29, 66.30, 472.00, 1376.53, 75.87, 75.61, 53.94), 86.22),
            ((34.29, 74.06, 42.63, 61.05, 434.62, 1267.52, 69.86, 69.62, 49.67), 79.39),
        ],
    ),
    "bunny": (
        (34.10, 70.70, 25.80, 60.49, 289.30, 1487.71, 87.82, 22.80, 54.72),
        [
            ((30.90, 65.64, 23.40, 55.73, 242.50, 1207.85, 87.94, 18.20, 51.83), 90.87),
            ((28.40, 55.73, 14.20, 43.97, 199.64, 807.95, 87.13, 12.50, 45.65), 75.58),
            ((33.80, 69.66, 18.80, 52.73, 271.43, 1456.41, 87.91, 15.80, 29.42), 88.84),
            ((29.00, 28.76, 10.10, 34.97, 272.86, 1273.34, 86.50, 10.50, 24.77), 69.03),
        ],
    ),
    "bunny, second table": (
        (34.10, 70.72, 25.80, 60.49, 289.31, 1487.71, 87.82, 22.80, 54.72),
        [
            ((33.00, 70.00, 24.20, 59.80, 304.29, 1457.06, 87.97, 21.80, 54.56), 98.98),
            ((32.35, 68.12, 22.60, 57.20, 252.51, 1349.91, 87.53, 20.80, 53.08), 94.37),
            ((29.15, 63.06, 21.00, 55.50, 244.64, 1281.66, 87.09, 19.80, 52.31), 90.48),
            ((28.10, 53.20, 19.40, 53.90, 216.07, 1115.33, 86.73, 18.80, 48.72), 83.86),
        ],
    ),
}


# A perfect model's score: MME cognition counts to 800 and perception to 2000, all others are in percent.
FULL = {name: {"MME-C": 800.0, "MME-P": 2000.0}.get(name, 100.0) for name in BENCHMARKS}


def scores(row):
    return dict(zip(BENCHMARKS, row, strict=True))


# Published AVG-% that are a hundredth off what their own nine printed scores give: (table, AVG-%) -> what these give.
# Scores are printed with two decimals or fewer: nine such roundings, of some 500 points together, move the average by
# up to 0.009, and it misses by 0.007 at most.
OFF_BY_A_HUNDREDTH = {
    ("internvl, second table", 99.12): 99.11475,
    ("internvl, second table", 95.96): 95.96587,
    ("bunny, second table", 94.37): 94.37686,
    ("bunny, second table", 90.48): 90.48687,
}


@pytest.mark.parametrize("table", TABLES)
def test_paper_average_gives_the_published_rows(table):
    original, rows = TABLES[table]
    for row, published in rows:
        computed = paper_average(scores(row), scores(original), FULL)
        if (table, published) in OFF_BY_A_HUNDREDTH:
            assert computed == pytest.approx(OFF_BY_A_HUNDREDTH[table, published], abs=5e-6)
            assert 0.005 < abs(computed - published) < 0.007
        else:
            assert round(computed, 2) == published


def test_there_are_24_published_rows():
    assert sum(len(rows) for _, rows in TABLES.values()) == 24


def test_the_two_averages_differ():
    original, rows = TABLES["llava"]
    assert mean_of_ratios(scores(rows[0][0]), scores(original)) == pytest.approx(89.21, abs=0.01)
    ratios = [100 * a / b for a, b in zip(rows[0][0], original, strict=True)]
    assert mean_of_ratios(scores(rows[0][0]), scores(original)) == pytest.approx(np.mean(ratios), rel=1e-12)


def test_averages_need_the_same_benchmarks():
    with pytest.raises(UserError, match="differ in GQA"):
        paper_average({"MMMU": 1.0}, {"MMMU": 1.0, "GQA": 2.0}, FULL)
    with pytest.raises(UserError, match="MMMU: the unpruned model scores 0"):
        mean_of_ratios({"MMMU": 1.0}, {"MMMU": 0.0})
    assert retained(0.5, 0.8) == pytest.approx(62.5)
    assert math.isnan(retained(0.5, 0.0))
