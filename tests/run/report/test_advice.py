"""What the guide recommends, as a section of the report."""

import re

from msgspec.structs import replace
from report_cases import change

from vlmprune_jax.run.report.build import build_report
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.result import Workload, read_result


def test_it_says_what_the_guide_recommends_for_the_cut_of_the_best_run(workdir):
    change(workdir, 1, actual_ratio=0.27, decoder_ratio=0.3, data_fraction=0.05)
    result = read_result(workdir)
    workload = Workload(length=640, images=1, dtype="bfloat16")
    write_artefact(workdir / "result.json", replace(result, workload=workload))
    text = re.sub(r"<[^>]+>", " ", build_report(workdir).read_text())
    told = text.partition("What the guide recommends")[2]
    assert "27 % of all parameters (30 % of the decoder), with the data it was trained on" in told
    assert "Recommended: remove whole layers by Block Influence; train adapters and projector" in told
    write_artefact(workdir / "result.json", result)
    assert "What the guide recommends" not in build_report(workdir).read_text()
