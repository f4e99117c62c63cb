"""A sweep of the golden LLaVA from the command line: nothing is made twice, a killed one goes on, in processes too."""

import json
import os

import pytest
from hf_cases import copy_llava

from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.workdir.sweep import read_sweep

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config(cuts="1"):
    global CUTS
    CUTS = int(cuts)
    config = experiment_config()
    config.model.hf_dir = "{root}/teacher"
    config.data.train = config.data.eval = "{root}/records.json"
    config.data.images = "{images}"
    config.data.system = ""
    config.score.samples = 4
    config.score.batch_size = 2
    config.prune.method = "width"
    config.prune.ratio = 0.1
    config.evaluate.batch_size = 4
    config.evaluate.max_new_tokens = 2
    config.evaluate.unrecovered = False
    config.recover.trainable = "projector"
    config.recover.batch_size = 2
    config.recover.steps = 4
    config.recover.save_every = 1
    config.recover.log_every = 1
    return config

def get_hyper(hyper):
    trained = hyper.product([hyper.named("recovery", {{"sft": {{}}}}), hyper.sweep("recover.seed", [1, 2])])
    first = hyper.chainit([hyper.named("recovery", {{"none": {{"recover.method": "none"}}}}), trained])
    more = hyper.product([hyper.fixed("prune.ratio", 0.2), hyper.fixed("recover.seed", 1)])
    return hyper.chainit([first, more]) if CUTS > 1 else first
"""


@pytest.fixture
def sweep(tmp_path, goldens):
    """Callable (cuts, *flags) -> exit code."""
    copy_llava(goldens, tmp_path / "teacher")
    turns = [{"from": "human", "value": "<image>\nIs one here?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": f"r{i}", "image": f"img{i % 4}.png", "conversations": turns} for i in range(8)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "sweep.py").write_text(CONFIG.format(root=tmp_path, images=goldens / "data/images"))
    return lambda cuts, *flags: main(
        ["sweep", f"--config={tmp_path}/sweep.py:{cuts}", f"--workdir={tmp_path}/w", *flags]
    )


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_makes_nothing_twice(sweep, tmp_path, monkeypatch, capfd):
    from vlmprune_jax.core.recovery.metrics import Recorder

    record, workdir = Recorder.step, tmp_path / "w"

    def killed(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        record(self, step, *args)

    monkeypatch.setattr(Recorder, "step", killed)
    assert sweep(1) == 130
    monkeypatch.undo()
    out = capfd.readouterr().out
    assert "run 2 of 3: recovery=sft,seed=1" in out
    assert out.count("linked from another run") == 3  # the unpruned model's answers, scores, and the pruned model
    assert sweep(1) == 0
    out = capfd.readouterr().out
    assert "1 of 3 runs are done and unchanged, skipped" in out
    facts = json.loads((workdir / "runs/recovery=sft,seed=1/.stages/recover.json").read_text())["facts"]
    assert (facts["resumed_from"], facts["steps"]) == (2, 4)
    assert out.count("linked from another run") == 3
    begun = ["recover", "control/recover", "control/evaluate", "evaluate"]
    assert [line.split()[0] for line in out.splitlines() if line.endswith(" ...")] == begun * 2

    found = read_sweep(workdir)
    assert [one.name for one in found.models] == ["recovery=none", "recovery=sft,seed=1", "recovery=sft,seed=2"]
    none, first, _ = found.done
    assert (none.recovery, none.data_fraction, first.recovery) == ("none", 0.0, "recovered")
    assert [one.evaluation.control is None for one in found.done] == [True, False, False]
    assert found.models[1].group == found.models[2].group == "recovery=sft"
    assert len({one.digest for one in found.done}) == 3
    assert none.parameters == first.parameters < next(iter(found.unpruned.values())).parameters
    weights = [workdir / "runs" / one.run / "pruned/model.safetensors" for one in found.models]
    assert os.path.samefile(*weights[:2])
    assert os.path.samefile(*weights[1:])
    assert "3 of 3 runs are done: 3 models." in (workdir / "sweep.html").read_text()

    assert sweep(2, "--jobs=2") == 0
    out = capfd.readouterr().out
    assert "3 of 4 runs are done and unchanged, skipped" in out
    assert "[1]   prune ..." in out
    assert "[1]   control/recover: linked from another run" in out
    assert "[1] done; 0 of 1 runs left" in out
    assert [one.status for one in read_sweep(workdir).models] == ["done"] * 4
