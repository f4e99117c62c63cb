"""A planned recovery step in words."""

from msgspec.structs import replace
from report_cases import PLANNED


def test_what_a_planned_step_takes():
    """One image or several, pixels or features, a teacher in memory or in a cache."""
    told = dict(PLANNED.table())
    assert told["step"] == "64 rows of 2,048 tokens and 1 image, 2 micro-batches, remat full"
    assert told["student"] == "5,700,000,000 parameters in 27 layers, teacher 7,000,000,000 in 32"
    cached = {"images_buckets": [13], "feature_cache": True, "teacher": None, "teacher_top_k": 64}
    told = dict(replace(PLANNED, **cached).table())
    assert told["step"] == "64 rows of 2,048 tokens and 13 cached images, 2 micro-batches, remat full"
    assert told["student"] == "5,700,000,000 parameters in 27 layers, the teacher's top 64 from its cache"
