"""`vlmprune inspect` and `vocabulary`: what they say of every family, from headers alone and at full size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_cases import LLAMA, keep_width, make_folder
from repository import ROOT, full_size_models
from vocabulary_cases import TOPICS, texts_file, tokenized_folder

import vlmprune_jax as vp
from vlmprune_jax.base.settings import override
from vlmprune_jax.base.weight_files import Entry
from vlmprune_jax.core.limits import ENGINES
from vlmprune_jax.core.models.params import count_params, flatten
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.layout import make_slots
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning.case import predict_plan

# Golden folder, its tower's -> family and layout.
GOLDENS = {
    ("llava_hf", None): "llava, transformers layout",
    ("llava_orig", "clip_tower"): "llava, original layout",
    ("bunny", "siglip_tower"): "bunny, original layout",
    ("internvl", None): "internvl, original layout",
    ("llama_gqa", None): "llama, transformers layout",
}


@pytest.mark.parametrize("name", GOLDENS, ids=lambda name: name[0])
def test_every_family_from_headers_alone(goldens, capsys, monkeypatch, name):
    folder, tower = goldens / "ckpt" / name[0], name[1] and goldens / "ckpt" / name[1]
    model = vp.load(folder, vision_dir=tower)
    for read in ("raw", "pieces"):
        monkeypatch.setattr(Entry, read, None)  # a weight that is looked at is an error
    options = [f"--vision_dir={tower}"] if tower else []
    assert main(["inspect", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert GOLDENS[name] in out
    assert max(map(len, out.splitlines())) <= 120 + len(str(folder))
    assert main(["inspect", str(folder), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == sum(leaf.size for leaf in flatten(model.params).values())
    assert found["text"]["layers"] == len(model.cfg.text.layers)
    assert found["shards"] == len(list(folder.glob("*.safetensors")))
    assert found["bytes"] == sum(entry.end - entry.begin for entry in Checkpoint(folder).entries.values())
    uneven = found["loads"]["gguf"]["text"]["unequal widths"]
    assert (uneven is None) == (found["family"] != "bunny")
    assert set(found["loads"]) == set(ENGINES)
    if found["family"] == "bunny":
        for line in (
            "  loads in    transformers: fewer layers, neurons, heads; tower: fewer layers, neurons\n",
            "              vllm: fewer layers, neurons; tower: fewer layers, neurons\n",
            "              mlx: nothing: mlx-vlm's LLaVA has no phi decoder",
            "              vllm_tpu: nothing: tpu-inference 0.32 has no class for bunny: serve it",
        ):
            assert line in out
        assert 'hidden_size / heads: use heads="keep"' in found["loads"]["vllm"]["text"]["heads"]


def test_layers_of_unequal_width(tmp_path, capsys):
    source = make_folder(tmp_path / "llama", LLAMA)
    plan = keep_width(vp.load(source), [0, 2], range(0, 50), [1, 2])[1]
    vp.prune_folder(source, plan, tmp_path / "out")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 x (6/3 heads, 56 neurons), 2 x (4/2 heads, 50 neurons), 1 x (6/3 heads, 56 neurons)" in out


FACTS = {
    "families/gemma4_dense/ckpt": ["gguf: fewer layers, neurons; tower: fewer layers, neurons, unequal widths\n"],
    "ckpt/llama_gqa": ["3 x (6/2 heads, 64 neurons)"],
    "families/qwen2_5_vl/ckpt": [
        "are computed: 4 x (5 heads, 52 neurons), 2 of them without windows\n",
        "images of any size, a token for 2 x 2 patches of 5\n",
        "at most 19.3 % by depth",
    ],
    "families/qwen3_vl/ckpt": [
        "at most 25.2 % by depth",
        "of the vision tower is 3.5 %",
        "              no layer can be removed; at most ",
    ],
}


@pytest.mark.parametrize("folder", FACTS)
def test_what_is_special_of_a_family(goldens, capsys, folder):
    assert main(["inspect", str(goldens / folder)]) == 0
    out = capsys.readouterr().out
    assert [line for line in FACTS[folder] if line not in out] == []


def sparse_folder(config, folder):
    """A folder with true headers, whose shards of 5 GB are holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, cfg = read_config(folder)
    shards, size, weight_map = [{}], 0, {}
    for slot in make_slots(cfg, family):
        n_bytes = 2
        for length in slot.hf_shape:
            n_bytes *= length
        if slot.start:
            continue
        if size + n_bytes > 5 * 10**9:
            shards.append({})
            size = 0
        entry = {"dtype": "BF16", "shape": list(slot.hf_shape), "data_offsets": [size, size + n_bytes]}
        shards[-1][slot.key], size = entry, size + n_bytes
    for number, header in enumerate(shards, start=1):
        name, text = f"model-{number:05d}-of-{len(shards):05d}.safetensors", json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        weight_map |= dict.fromkeys(header, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_full_size_in_an_instant(tmp_path):
    """LLaVA-1.5-7B, 14 GB: 0.9 s on an idle machine, since no weight is read, and no slow package imported.

    No device is started, which takes a TPU ten seconds and fails where another process holds it.
    """
    folder = sparse_folder(full_size_models()["llava"], tmp_path / "llava")
    assert sum(path.stat().st_size for path in folder.iterdir()) > 14e9
    command = [sys.executable, "-X", "importtime", "-m", "vlmprune_jax", "inspect", str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_device"}
    pipes = {"stdout": subprocess.PIPE, "text": True}
    with (tmp_path / "imports").open("w") as imports:
        process = subprocess.Popen(command, stderr=imports, cwd=ROOT, env=environment, **pipes)
    with process.stdout:
        out = process.stdout.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its counters are still there
    read = int(Path(f"/proc/{process.pid}/io").read_text().split()[1])
    assert process.wait() == 0
    # the reference's 7,062,902,784, with 64 more words twice, without the tower's last block and final norm
    assert "parameters  7,050,828,800: decoder 6,738,939,904 (95.6 %)" in out
    assert "32 x (32 heads, 11,008 neurons)" in out
    assert read < 2e8  # bytes, of which the modules are nearly all
    imported = (tmp_path / "imports").read_text()
    assert "vlmprune_jax.io.exports.describe" in imported
    for slow in ("transformers", "torch", "orbax", "grain"):
        assert f" {slow}\n" not in imported


# --- `vlmprune vocabulary` -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tokenized_folder(tmp_path_factory.mktemp("model") / "llama", "llama")


def test_a_row_for_each_size(model, tmp_path, capsys):
    sources = texts_file(tmp_path / "s.json", [TOPICS[2][i * 100 : (i + 1) * 100] for i in range(40)])
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["vocabulary", f"--model={model}", f"--sources={sources}", "--sizes=400,448", "--multiple=8"]) == 0
    out = capsys.readouterr().out
    assert "on 4 held-out texts" in out
    cfg = read_config(model)[1]
    for size in (400, 448):
        row = next(line.split() for line in out.splitlines() if line.strip().startswith(f"{size} "))
        per_row = (1 if cfg.text.tie_embeddings else 2) * cfg.text.hidden_size
        assert row[1] == f"{count_params(cfg) - (640 - size) * per_row:,}"
    assert "--config.prune.vocabulary.size=N" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("inspect", "takes one folder"),
        ("inspect {goldens}/ckpt/bunny", "set vision_dir (--config.model"),
        ("vocabulary", "no model given: add --model=DIR"),
        ("vocabulary --model={model} --sizes=many", "--sizes=many: must be a number of tokens, such as 16384 or 16k"),
        ("vocabulary --model={model}", "prune.vocabulary.sources: name at least one file"),
        ("vocabulary --model={model} --sources=none.txt", "none.txt: no such file (set in prune.vocabulary)"),
        ("vocabulary --model={model} --sources={file} --sizes=64", "tokens must stay (bytes, special tokens, templ"),
    ],
)
def test_refusals(goldens, model, tmp_path, capsys, argv, message):
    file = texts_file(tmp_path / "s.json", ["a"])
    assert main(argv.format(goldens=goldens, model=model, file=file).split()) == 2
    assert message in capsys.readouterr().err


def test_the_planner_predicts_its_shapes(model):
    """It knows the size without reading a source."""
    changes = {"prune": {"ratio": 0.3, "method": "width", "vocabulary": {"size": 443, "multiple": 8}}}
    cfg = read_config(model)[1]
    plan = predict_plan(override(Experiment(), changes), cfg)
    assert plan.apply_to(cfg).text.vocab_size == 448
    assert plan.actual_ratio == pytest.approx(0.3, abs=0.03)
