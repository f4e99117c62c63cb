"""Runs of a sweep: skipped, shared, failed, killed, spread over shards and processes; and what is told of them."""

import csv
import json
import os
import shutil
import signal

import pytest
import sweep_cases as cases
from experiment_cases import record, write_experiment
from msgspec.structs import replace
from refusal import refused
from repository import start_counting
from study_cases import row

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.report import build
from vlmprune_jax.run.sweep import sweep as sweep_run
from vlmprune_jax.run.sweep.hyper import shard_of
from vlmprune_jax.run.sweep.workers import in_processes
from vlmprune_jax.run.workdir.result import read_result
from vlmprune_jax.run.workdir.speed import SpeedUp
from vlmprune_jax.run.workdir.sweep import read_sweep

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config(variant=""):
    config = experiment_config()
    config.model.hf_dir = "{root}/teacher"
    config.data.train = config.data.eval = "{root}/records.json"
    config.evaluate.unrecovered = False
    config.recover.method = "none"
    {settings}
    return config

def get_hyper(hyper):
    {body}
"""
BODY = 'return hyper.sweep("config.prune.ratio", [0.1, 0.2, 0.3, 0.4])'


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Callable (*flags, body=...) -> exit code of `vlmprune sweep` with made-up models; `.ran`, `.fail`, `.pages`."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text("{}")
    (tmp_path / "records.json").write_text("[]")
    workdir = tmp_path / "w"

    def made(experiment, context):
        call.ran.append(experiment.prune.ratio)
        for ratio, error in call.fail.items():
            if experiment.prune.ratio == ratio:
                raise error
        return cases.make_models(experiment, context)

    def call(*flags, body=BODY):
        config = CONFIG.format(root=tmp_path, settings="", body=body)
        (tmp_path / "sweep.py").write_text(config if body else config.split("def get_hyper")[0])
        call.ran.clear()
        return main(["sweep", f"--config={tmp_path}/sweep.py", f"--workdir={workdir}", *flags])

    call.ran, call.fail, call.pages, call.checked, call.workdir = [], {}, [], [], workdir
    monkeypatch.setattr(sweep_run, "make_models", lambda work: made(work.experiment, work))
    monkeypatch.setattr(sweep_run, "preflight", lambda work, command: call.checked.append(command))
    monkeypatch.setattr(build, "build_sweep_page", lambda folder: call.pages.append(folder))
    return call


def states(workdir):
    return {one.run: one.status for one in read_sweep(workdir).models}


def test_every_run_once(sweep, capsys):
    assert sweep() == 0
    assert sweep.ran == [0.1, 0.2, 0.3, 0.4]
    assert sweep.checked == ["run"] * 4  # before the first model call of each
    out = capsys.readouterr().out
    assert "run 2 of 4: ratio=0.2" in out
    assert "unpruned" in out
    found = read_sweep(sweep.workdir)
    assert [one.name for one in found.models] == ["ratio=0.1", "ratio=0.2", "ratio=0.3", "ratio=0.4"]
    assert found.models[1].overrides == {"prune.ratio": 0.2}
    one = found.models[1].found
    assert (one.recovery, one.reconstruct, one.parameters) == ("none", "none", 800)
    assert (one.costs.file_bytes, one.costs.forward_flops) == (6_400_000, 1_600_000_000)
    assert (one.speed.prefill, one.speed.decode) == (1.25, 10.0)
    assert one.speed.prefill_speedup == SpeedUp(2.5, 2.375, 2.625, 0.05)
    assert one.evaluation.retained["docs"] == pytest.approx(80)
    assert (sweep.workdir / one.path).is_dir()
    lines = list(csv.DictReader((sweep.workdir / "sweep.csv").read_text().splitlines()))
    assert [line["run"] for line in lines] == [one.run for one in found.models]
    assert float(lines[1]["docs.retained"]) == pytest.approx(80)
    assert lines[1]["label.ratio"] == "0.2"
    assert [lines[1][f"prefill_speedup{end}"] for end in ("", "_low", "_high")] == ["2.5", "2.375", "2.625"]
    assert sweep.pages == [sweep.workdir]
    assert read_result(sweep.workdir / "runs/ratio=0.2").best == "depth"

    assert sweep() == 0
    assert sweep.ran == []
    assert "4 of 4 runs are done and unchanged, skipped" in capsys.readouterr().out
    assert sweep("--config.score.samples=7") == 0  # of other settings none is done
    assert sweep.ran == [0.1, 0.2, 0.3, 0.4]
    (sweep.workdir.parent / "records.json").write_text("[1]")
    assert sweep("--config.score.samples=7") == 0
    assert sweep.ran == [0.1, 0.2, 0.3, 0.4]


def test_failed_runs_are_listed_and_tried_again_last(sweep, capsys):
    sweep.fail = {0.1: UserError("no"), 0.2: KeyboardInterrupt()}
    assert (sweep(), sweep.ran) == (130, [0.1, 0.2])
    sweep.fail = dict.fromkeys((0.1, 0.2, 0.3, 0.4), UserError("no"))
    assert (sweep(), sweep.ran) == (2, [0.2, 0.3, 0.4, 0.1])
    assert set(states(sweep.workdir).values()) == {"failed"}
    assert sweep.pages == []
    capsys.readouterr()
    sweep.fail = {0.1: UserError("no such thing"), 0.3: ZeroDivisionError("a defect")}
    assert (sweep(), sweep.ran) == (2, [0.1, 0.2, 0.3, 0.4])
    out, err = capsys.readouterr()
    assert "  failed: no such thing" in out
    assert "failed: ratio=0.3: ZeroDivisionError: a defect" in out
    told = "2 of 4 runs failed, first ratio=0.1: no such thing: run the same command to retry"
    assert err == f"vlmprune: error: {told}\n"
    found = read_sweep(sweep.workdir).models
    assert [one.status for one in found] == ["failed", "done", "failed", "done"]
    assert found[2].error == "ZeroDivisionError: a defect"
    sweep.fail = {}
    assert (sweep(), sweep.ran) == (0, [0.1, 0.3])
    assert set(states(sweep.workdir).values()) == {"done"}


def test_shards_and_chosen_runs(sweep):
    assert sweep("--only=*0.[34]", "--shard=2/2") == 0
    assert sweep.ran == [0.4]
    ran = []
    for shard in ("1/3", "2/3"):
        assert sweep(f"--shard={shard}") == 0
        ran += sweep.ran
    assert ran == [0.1, 0.2]
    assert list(states(sweep.workdir).values()) == ["done", "done", "pending", "done"]
    assert sweep("--only=ratio=0.[23]") == 0
    assert sweep.ran == [0.3]
    runs = cases.some_runs()
    for count in (1, 2, 3, 7, 40):
        shards = [shard_of(runs, f"{number}/{count}") for number in range(1, count + 1)]
        assert sorted(run.name for shard in shards for run in shard) == sorted(run.name for run in runs)
    for shard in ("0/2", "3/2", "2", "a/b", "-1/2", "1/2/3", "", "1/" + "9" * 5000, "²/2"):
        refused(r"--shard=.*: must be i/n with i from 1 to n", shard_of, runs, shard)


SEVERAL = 'return hyper.sweep("evaluate.questions", [9, 8])'
RANK = "return [{'recover.lora': {'rank': 3}}]"


@pytest.mark.parametrize(
    ("flags", "body", "told"),
    [
        ("", "return [{'prune.rato': 0.1}]", "config.prune has no setting 'rato'; did you mean 'ratio'?"),
        ("", "return 1 / 0", " with ZeroDivisionError: division by zero: correct it (--debug shows more)"),
        ("", "return [{'score.depth': 'l7'}]", "run only: score.depth 'l7' is not one of"),
        ("", SEVERAL, "its evaluation sets differ from those of questions=9"),
        ("--config.prune.ratio=0.2", BODY, "--config.prune.ratio: get_hyper sets this setting too"),
        ("--config.recover.lora.rank=4", RANK, "--config.recover.lora.rank: get_hyper sets this setting too"),
        ("--jobs=0", BODY, "--jobs=0: 0 is not a positive integer"),
        ("--shard=5", BODY, "--shard=5: must be i/n"),
        ("--only=decoder=*", BODY, "--only=decoder=*: no run matches (the first is ratio=0.1)"),
        ("", None, "has no get_hyper(hyper), which lists the runs of a sweep"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(sweep, capsys, flags, body, told):
    assert sweep(*flags.split(), body=body) == 2
    assert told in capsys.readouterr().err
    assert sweep.ran == []
    assert not sweep.workdir.exists()


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_settings_without_effect_in_any_run_are_named_once(sweep, goldens, capsys, flags):
    shutil.copy(goldens / "ckpt/llava_hf/config.json", sweep.workdir.parent / "teacher")
    body = """return hyper.product([
        hyper.sweep("prune.method", ["depth", "width"]), hyper.sweep("data.fraction", [0.1, 0.2]),
        hyper.fixed("prune.ratio", 0.1), hyper.fixed("score.width", "l1"), hyper.fixed("reconstruct.refit", True),
    ])"""
    assert sweep(*flags, body=body) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "no effect" in line] == [
        'no effect: data.fraction, because recover.method="none" trains nothing',
        'no effect: reconstruct.refit, because reconstruct.method="none" repairs no weights',
        "no effect: evaluate.unrecovered, because nothing is reconstructed or trained after pruning",
    ]  # but score.width has an effect in the runs of width
    assert out.index("no effect") < out.index("4 runs" if flags else "run 1 of 4")


def test_a_dry_run_tells_what_is_shared(sweep, capsys):
    body = """return hyper.product([
        hyper.sweep("prune.ratio", [0.1, 0.2]),
        hyper.named("recovery", {"none": {}, "solved": {"reconstruct.method": "least_squares"},
                                 "sft": {"recover.method": "train"}}),
    ])"""
    assert sweep("--dry_run", body=body) == 0
    out = capsys.readouterr().out
    assert "6 runs: score 1 times, prune 2 times, reconstruct 2 times, recover 2 times" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit() and "0." in line]
    assert rows[0] == ["1", "0.1", "none", "makes", "makes"]
    assert rows[4] == ["5", "0.2", "solved", "of", "1", "of", "4", "makes"]
    assert sweep.ran == []
    assert not sweep.workdir.exists()


def test_equal_models_of_several_runs_are_listed_once(tmp_path):
    """What recovery starts from is the same folder in both; the last one is listed in any case."""
    runs, seen = cases.some_runs(seeds=(1, 2))[:2], set()
    names = []
    for run in runs:
        one = row("depth", 0.15, "none", 50.0, digest="same")
        models = [replace(one.found, path=name) for name in ("pruned", "recovered")]
        entry = replace(one, name=run.name, run=run.name, group=run.group, found=None)
        names += [one.name for one in sweep_run._entries(run, entry, models, seen)]
    assert names == [f"{runs[0].name}/pruned", runs[0].name, runs[1].name]


def test_a_run_whose_model_lies_elsewhere_is_done_again(tmp_path):
    runs = cases.some_runs(seeds=(1,))[:1]
    cases.write_sweep(tmp_path, runs=runs)
    sweep = sweep_run.Sweep(tmp_path, "c.py", overwrite=False)
    record = sweep.folder(runs[0]) / "result.json"
    assert sweep_run.read_run(runs[0], sweep) is not None
    found = json.loads(record.read_text())
    for path in ("../other/pruned", "/tmp/x", "pruned/../../../x"):
        found["runs"][0]["path"] = path
        record.write_text(json.dumps(found))
        assert sweep_run.read_run(runs[0], sweep) is None


def test_caches_are_shared_by_those_that_can():
    def caches(**changes):
        base = {"recover": {"teacher_cache": "t"}, "data": {"feature_cache": "f"}}
        found = sweep_run.with_caches(override(override(Experiment(), base), changes))
        assert found.recover.teacher_cache.startswith("t/")
        assert found.data.feature_cache.startswith("f/")
        return found.recover.teacher_cache, found.data.feature_cache

    first = caches()
    assert caches(prune={"ratio": 0.3, "method": "width"}, recover={"seed": 3}, data={"fraction": 0.5}) == first
    assert caches(recover={"teacher_top_k": 8})[0] != first[0]
    assert caches(model={"hf_dir": "other"})[0] != first[0]
    assert caches(model={"hf_dir": "other"})[1] != first[1]
    assert caches(prune={"stack": "vision", "ratio": 0.1})[1] != caches(prune={"stack": "vision", "ratio": 0.2})[1]
    assert sweep_run.with_caches(Experiment()) == Experiment()


# --- a sweep of the golden LLaVA -------------------------------------------------------------------------------------

SETTINGS = """
    config.data.images, config.data.system = {images!r}, ""
    config.score.samples, config.score.batch_size = 4, 2
    config.prune.method, config.prune.ratio = "width", 0.1
    config.evaluate.batch_size, config.evaluate.max_new_tokens = 4, 2
    config.recover = {{
        "method": "train", "trainable": "projector", "batch_size": 2, "steps": 4, "save_every": 1, "log_every": 1
    }}"""
TRAINED = """
    trained = hyper.product([hyper.named("recovery", {"sft": {}}), hyper.sweep("recover.seed", [1, 2])])
    first = hyper.chainit([hyper.named("recovery", {"none": {"recover.method": "none"}}), trained])"""
MORE = 'hyper.product([hyper.fixed("prune.ratio", 0.2), hyper.fixed("recover.seed", 1)])'


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_makes_nothing_twice(goldens, tmp_path, monkeypatch, capfd):
    step_of, workdir = Recorder.step, tmp_path / "w"
    write_experiment(tmp_path, goldens, [record(f"r{i}", f"img{i % 4}.png", "Is one here?", "yes") for i in range(8)])
    settings = SETTINGS.format(images=str(goldens / "data/images"))

    def sweep(body, *flags):
        """Return exit code and output."""
        (tmp_path / "sweep.py").write_text(CONFIG.format(root=tmp_path, settings=settings, body=TRAINED + body))
        code = main(["sweep", f"--config={tmp_path}/sweep.py", f"--workdir={workdir}", *flags])
        return code, capfd.readouterr().out

    def killed(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        step_of(self, step, *args)

    monkeypatch.setattr(Recorder, "step", killed)
    code, out = sweep("\n    return first")
    monkeypatch.undo()
    assert code == 130
    assert "run 2 of 3: recovery=sft,seed=1" in out
    assert out.count("linked from another run") == 3  # the unpruned model's answers, scores, and the pruned model
    code, out = sweep("\n    return first")
    assert code == 0
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

    code, out = sweep(f"\n    return hyper.chainit([first, {MORE}])", "--jobs=2")
    assert code == 0
    assert "3 of 4 runs are done and unchanged, skipped" in out
    assert "[1]   prune ..." in out
    assert "[1]   control/recover: linked from another run" in out
    assert "[1] done; 0 of 1 runs left" in out
    assert [one.status for one in read_sweep(workdir).models] == ["done"] * 4


# --- worker processes ------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_costs_its_item_alone():
    told = {}
    items = [1, 2, "die", 3, "fail", 4, 5]
    in_processes(items, 2, start_counting, lambda item, line: told.setdefault(item, line))
    assert set(told) == set(items)
    assert told["die"].startswith("its process ended (SIGKILL), perhaps out of memory")
    assert told["fail"] == "it failed"
    pids = {told[item].split()[0] for item in (1, 2, 3, 4, 5)}
    assert len(pids) in (2, 3)  # and not a process for every item


def test_workers_import_nothing_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("multiprocessing", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()\n")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    told = []
    in_processes([1], 1, start_counting, lambda item, line: told.append(line))
    assert told[0].endswith("1"), told
    assert not os.environ["PYTHONSAFEPATH"]  # processes that the caller starts later import as they always did
    assert not (tmp_path / "ran").exists()


def no_space():
    raise UserError("the disk is full")


@pytest.mark.parametrize(
    ("error", "stop"), [(KeyboardInterrupt, lambda: os.kill(os.getpid(), signal.SIGINT)), (UserError, no_space)]
)
def test_what_goes_wrong_between_items_ends_all_processes(monkeypatch, error, stop):
    told = []

    def done(item, line):
        told.append(line)
        stop()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has none
    try:
        with pytest.raises(error):
            in_processes(["sleep"] * 50, 2, start_counting, done)
    finally:
        signal.signal(signal.SIGINT, before)
    pids = {int(line.split()[0]) for line in told}
    assert pids
    assert len(told) < 10
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
