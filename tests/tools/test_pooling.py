"""Effects over seeds and questions: what intervals cover, and how settings are pooled."""

import numpy as np
import pytest
from pooling import Value, heterogeneity, pooled

from vlmprune_jax.run.evaluation.statistics import interval_of_mean


def cell(values, questions=None):
    return [Value(seed, value, questions) for seed, value in enumerate(values)]


def test_one_setting_is_students_t_over_seeds():
    found = pooled({"a": cell([1.0, 2.0, 4.0])})
    assert (found.mean, *found.interval) == pytest.approx(interval_of_mean([1.0, 2.0, 4.0]))
    assert found.seeds == 3
    assert pooled({"a": cell([1.0])}).interval is None
    assert pooled({"a": cell([1.0])}).p_differs(0) == 1.0


def test_the_interval_covers_other_seeds_and_other_questions():
    """True effect 1; each draw has its own seeds and questions. Seeds alone would cover too little."""
    draw, inside, too_small = np.random.default_rng(0), 0, 0
    for _ in range(400):
        of_questions, of_seeds = draw.normal(size=50), draw.normal(scale=0.2, size=4)
        rows = [1 + seed + of_questions + draw.normal(scale=0.1, size=50) for seed in of_seeds]
        values = [Value(seed, float(row.mean()), row) for seed, row in enumerate(rows)]
        low, high = pooled({"a": values}).interval
        inside += low < 1 < high
        low, high = pooled({"a": [Value(one.seed, one.value) for one in values]}).interval
        too_small += low < 1 < high
    assert 0.93 < inside / 400 < 0.99
    assert too_small / 400 < 0.92


def test_heterogeneity_is_found_where_it_is():
    """Under one effect and ten times the noise in one setting, Welch's test is right in 95 % of draws."""
    draw, wrong, right = np.random.default_rng(0), 0, 0
    for _ in range(400):
        cells = [cell(draw.normal(scale=10.0 if place == 7 else 1.0, size=6)) for place in range(8)]
        wrong += heterogeneity([pooled({"a": values}) for values in cells]).p_value < 0.05
        cells[0] = [Value(one.seed, one.value + 3.0) for one in cells[0]]
        right += heterogeneity([pooled({"a": values}) for values in cells]).p_value < 0.05
    assert 0.01 < wrong / 400 < 0.08
    assert right / 400 > 0.9
    found = heterogeneity([pooled({"a": cell(values)}) for values in ([1.0, 3.0], [4.0, 6.0])])
    assert (found.q, found.freedom, found.i_squared) == (pytest.approx(4.5), 1, pytest.approx(100 * 3.5 / 4.5))
    assert heterogeneity([pooled({"a": cell([1.0])})] * 2) is None
