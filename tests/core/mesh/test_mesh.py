"""How the processes of a run find each other and end together, and how much memory is free."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import types
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from hf_cases import LLAVA, assert_equal, expanded_batch, make_folder, random_ids
from prune_cases import config
from refusal import refused
from repository import HANG, load_arrays
from stack_cases import decoder_layer

from vlmprune_jax.base import processes
from vlmprune_jax.core.mesh import machine, mesh
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.generate import generate
from vlmprune_jax.core.models.params import flatten, param_axes
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.core.recovery.program import place_rows
from vlmprune_jax.io.checkpoints.read import load


def test_free_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    assert 2**20 < machine.free_memory() * len(jax.local_devices()) <= 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert machine._of_container() == 2**62
    (tmp_path / "memory.max").write_text(f"{100 + 8000 * len(jax.local_devices())}\n")
    assert machine.free_memory() == 8000
    devices = [types.SimpleNamespace(memory_stats=lambda u=u: {"bytes_limit": 90, "bytes_in_use": u}) for u in (30, 50)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert machine.free_memory() == 40


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize is called with; nothing in the environment names other processes."""
    calls = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **timeouts: calls.append(args))
    for name in (*mesh.VARIABLES, "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def tpu_vm(monkeypatch):
    """Callable (status, text): this machine has libtpu, and a metadata server that answers so."""
    answers, seen = [], []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers["Metadata-Flavor"]))
            status, text = answers[-1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(mesh.importlib.util, "find_spec", lambda name: name == "libtpu")
    yield lambda status, text: (answers.append((status, text)), seen)[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("sizes", "heads", "gib", "memory", "expected"),
    [
        ((1, 8, 1), 32, 12.6, 15.75, (2, 1, 4)),  # LLaVA-1.5-7B on v5e:2x4
        ((8, 1, 1), 32, 3.9, 15.75, (8, 1, 1)),
        ((1, 8, 1), 32, 100, 15.75, (1, 1, 8)),
        ((1, 8, 1), 6, 12.6, 15.75, (4, 1, 2)),  # 6 heads divide no further
        ((2, 4, 1), 32, 1, None, (2, 1, 4)),  # unknown memory: as many chips share the weights as before
        ((2, 4, 1), 6, 1, None, (4, 1, 2)),
    ],
)
def test_weights_stay_on_their_chips_while_decoding(monkeypatch, sizes, heads, gib, memory, expected):
    monkeypatch.setattr(mesh, "_memory_limit", lambda: memory and memory * 2**30)
    cfg = config((decoder_layer(heads, heads, 96),), vocab_size=64)
    found = mesh.decoding_mesh(cfg, mesh.make_mesh(*sizes), gib * 2**30)
    assert tuple(found.shape.values()) == expected
    assert mesh.decoding_mesh(cfg, None, gib * 2**30) is None
    assert mesh.decoding_mesh(cfg, mesh.make_mesh(*sizes), 1, (4, 2, 1)).shape["fsdp"] == 2
    refused(r"needs 9 devices but there are 8", mesh.decoding_mesh, cfg, mesh.make_mesh(*sizes), 1, (3, 3, 1))


def test_named_processes_are_joined(joined, monkeypatch):
    mesh.initialize("host:1234", 4, 0)
    monkeypatch.setenv("VLMPRUNE_COORDINATOR", "other:99")
    monkeypatch.setenv("VLMPRUNE_NUM_PROCESSES", "2")
    monkeypatch.setenv("VLMPRUNE_PROCESS_ID", "1")
    mesh.initialize(None, None, None)
    mesh.initialize(None, None, 0)
    assert joined == [("host:1234", 4, 0), ("other:99", 2, 1), ("other:99", 2, 0)]
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    mesh.initialize("host:1234", 4, 0)
    assert len(joined) == 3
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", mock.Mock(side_effect=RuntimeError("DEADLINE:\n timed out")))
    refused(r"process 1 of 2 at host:1: cannot join .*DEADLINE: timed out", mesh.initialize, "host:1", 2, 1)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("host:1", 2, None), "set --coordinator=HOST:PORT"),
        ((None, None, 0), "num_processes None, process_id 0"),
        (("host", 2, 0), "coordinator 'host' must be HOST:PORT"),
        (("host:port", 2, 0), "coordinator 'host:port' must be HOST:PORT"),
        (("host:1", 2, 2), "process 2 of 2: process_id must be between 0 and num_processes - 1"),
        (("host:1", 2, -1), "process -1 of 2"),
    ],
)
def test_impossible_places_are_refused(joined, place, message):
    refused(message, mesh.initialize, *place)
    assert joined == []


ATTRIBUTE = ("/computeMetadata/v1/instance/attributes/worker-network-endpoints", "Google")
TWO, HOSTS = (200, "a:1:10.0.0.1,b:2:10.0.0.2"), "TPU_WORKER_HOSTNAMES"


@pytest.mark.parametrize(
    ("answer", "variables", "slice_has_workers", "asked"),
    [
        (TWO, {}, True, True),
        ((200, "a:1:10.0.0.1"), {}, False, True),  # one host
        ((404, ""), {}, False, True),  # a machine of Google Cloud without TPUs that has libtpu to compile for them
        (TWO, {HOSTS: "w0,w1"}, True, False),  # GKE tells in the environment
        (TWO, {"TPU_PROCESS_ADDRESSES": "w0:1,w1:1"}, True, False),
        (TWO, {HOSTS: "w0", "MEGASCALE_COORDINATOR_ADDRESS": "w0:1"}, True, False),
        (TWO, {HOSTS: "w0"}, False, False),
        (TWO, {"TPU_SKIP_MDS_QUERY": "1"}, False, False),
        (TWO, {HOSTS: "w0,w1", "JAX_PLATFORMS": "cpu"}, False, False),
    ],
)
def test_workers_of_a_tpu_slice(joined, tpu_vm, monkeypatch, answer, variables, slice_has_workers, asked):
    """The environment tells of them, else the metadata server."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seen = tpu_vm(*answer)
    mesh.initialize(None, None, None)
    assert (joined, seen) == ([()] * slice_has_workers, [ATTRIBUTE] * asked)


def test_a_metadata_server_in_trouble_is_no_answer(joined, tpu_vm):
    tpu_vm(503, "")
    refused("HTTP error 503, so the workers of the slice are unknown", mesh.initialize, None, None, None)


def test_a_platform_that_is_not_there_is_one_line(tmp_path):
    """jax asserts that CUDA is there, without a message."""
    demo = [sys.executable, "-m", "vlmprune_jax", "demo", f"--workdir={tmp_path}"]
    run = subprocess.run(demo, env={**os.environ, "JAX_PLATFORMS": "cuda"}, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("vlmprune: error: JAX_PLATFORMS=cuda: jax cannot start this platform (no such device,")
    assert run.stderr.count("\n") == 1


def test_rows_follow_the_devices_of_the_mesh():
    """Of eight devices on four hosts, data 2 x fsdp 2 x tensor 2; hosts lie along `tensor`, or across rows."""

    def rows(hosts, local):
        devices = np.asarray([f"{host}-{place}" for place, host in enumerate(hosts)]).reshape(2, 2, 2)
        mine = [device for device in devices.flat if device[0] in local]
        shape = {"data": 2, "fsdp": 2, "tensor": 2}
        return mesh.rows_of_process(SimpleNamespace(devices=devices, local_devices=mine, shape=shape), 8).tolist()

    assert [rows("aabbccdd", host) for host in "abcd"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [rows("aabbaabb", host) for host in "ab"] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [rows("abababab", host) for host in "ab"] == [list(range(8))] * 2  # each row is on both
    assert rows("aabbccdd", "abcd") == list(range(8))  # one process with the devices of all hosts: Pathways
    assert mesh.rows_of_process(None, 3).tolist() == [0, 1, 2]
    refused("batch size 6 .* mesh.data x mesh.fsdp = 4", mesh.rows_of_process, mesh.make_mesh(2, 2, 2), 6)


def test_under_pathways_the_process_index_decides_nothing(monkeypatch):
    """One process controls all devices, and jax counts their hosts as processes: this process loads whole batches."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert (processes.process_number(), processes.process_count(), processes.is_main_process()) == (0, 1, True)
    devices = mesh.make_mesh(4, 2, 1)
    assert mesh.rows_of_process(devices, 16).tolist() == list(range(16))
    assert processes.from_all(lambda: 1) == [1]
    whole = np.arange(16.0).reshape(16, 1)
    placed = place_rows({"x": whole}, devices)["x"]
    assert np.array_equal(mesh.gather_to_host(placed), whole)


PROCESS = """
import sys
import jax, numpy
from jax.experimental import multihost_utils
from vlmprune_jax.core.mesh import mesh, stop

jax.config.update("jax_platforms", "cpu")
address, failing, count, number = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4])
stop.POLL_SECONDS = 1e-4 if failing == ["none"] else 0.01 if str(number) in failing else 1.0  # hear of it late
mesh.initialize(address, count, number)
multihost_utils.process_allgather(numpy.zeros(1))  # connects all with all
print("so far")
if str(number) in failing:
    sys.exit(stop.end(f"first line\\nvlmprune: error: record r{number}", f"record r{number}", 2))
try:
    multihost_utils.process_allgather(numpy.zeros(1))  # which the failing ones never join
except Exception as error:
    sys.exit(stop.end(f"vlmprune: error: {error}", "a broken connection", 134))
"""


def run(failing: str, count: int) -> list[tuple[int, list[str]]]:
    """(exit code, own lines on standard error) of each process; what they had printed is there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        command = [sys.executable, "-c", PROCESS, f"localhost:{free.getsockname()[1]}", failing, str(count)]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is printed stays in the process until it is flushed
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": buffered}
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in range(count)]
    said = [process.communicate(timeout=HANG) for process in processes]
    assert all("so far" in out.splitlines() for out, _ in said)
    ours = [[line for line in err.splitlines() if "vlmprune" in line or line == "first line"] for _, err in said]
    return [(process.returncode, lines) for process, lines in zip(processes, ours, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("failing", "count"), [(0, 2), (1, 3)])  # process 0 has the store by which the others hear
def test_the_failure_of_one_ends_all_and_names_it(failing, count):
    own = ["first line", f"vlmprune: error: record r{failing}"]
    expected = [(2, [f"vlmprune: error: process {failing} failed: record r{failing}"])] * count
    expected[failing] = (2, own)
    assert run(str(failing), count) == expected


@pytest.mark.slow
def test_all_may_fail_at_once_and_those_who_end_well_end_nobody():
    """Each tells of one failure, and nobody waits for the others in vain."""
    for number, (code, lines) in enumerate(run("0,1", 2)):
        assert (code, sum("vlmprune: error: " in line for line in lines)) == (2, 1), (number, lines)
    assert run("none", 2) == [(0, [])] * 2


# --- a model on 8 devices computes what it computes on one, on every shape of the mesh --------------------------------


# A logit of 10 in float32 is 1e-5 away from its value in float64, on one device and on 8 alike; one of 32 in torch
# and in JAX 1.5e-4, so large logits are compared relative to their size.
close = dict(atol=1e-5, rtol=1e-5)
closer = dict(atol=1e-5, rtol=0)
want = ("hidden", "image_features")


@pytest.fixture(scope="module")
def batches(goldens):
    """Golden rows with one image slot each: 8, so that the batch is split as well, and 3, which no mesh divides."""
    golden, folder = load_arrays(goldens / "forward/llava.npz"), goldens / "ckpt/llava_hf"
    one = load(folder)
    ids, mask = expanded_batch(golden, one.cfg.image_token_id, one.cfg.tokens_per_image)
    result = {}
    for rows in (np.arange(8) % 3, np.arange(3)):
        pixels = golden["pixel_values"][rows][:, None]
        inputs = {"input_ids": ids[rows], "pixel_values": pixels, "attention_mask": mask[rows]}
        result[len(rows)] = inputs, golden["logits"][rows], *forward(one, **inputs, capture=want)
    return result


def load_on(mesh, folder, **options):
    """Return a model, each of whose leaves is split as its axes say."""
    model = load(folder, mesh=mesh, **options)
    axes = param_axes(model.cfg)
    for path, leaf in flatten(model.params).items():
        assert leaf.sharding == sharding(mesh, axes[path]), path
    return model


@pytest.mark.parametrize(
    ("sizes", "rows"), [((8, 1, 1), 8), ((1, 8, 1), 8), ((2, 2, 2), 8), ((1, 2, 4), 8), ((4, 1, 2), 3)]
)
def test_llava(goldens, batches, sizes, rows):
    model = load_on(make_mesh(*sizes), goldens / "ckpt/llava_hf")
    inputs, reference, expected, expected_aux = batches[rows]
    found, aux = forward(model, **inputs, capture=want)
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], **close)
    np.testing.assert_allclose(aux["image_features"], expected_aux["image_features"], **closer)
    for a, b in zip(aux["hidden"], expected_aux["hidden"], strict=True):
        np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], **closer)
    np.testing.assert_allclose(np.asarray(found)[real][:, :400], reference[real], atol=1e-4, rtol=0)


def test_a_mesh_that_does_not_divide_says_what_would(goldens):
    refused("layer 0 = 4.*data=2 fsdp=1 tensor=4", load, goldens / "ckpt/llava_hf", mesh=make_mesh(1, 1, 8))


def test_generation(tmp_path):
    folder = make_folder(tmp_path / "llava", {**LLAVA, "text_config": {**LLAVA["text_config"], "vocab_size": 96}})
    one, many = load(folder), load(folder, mesh=make_mesh(2, 4, 1))
    inputs = random_ids(one)
    tokens = [generate(model, **inputs, max_new_tokens=6, eos_token_ids=()) for model in (one, many)]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(
    ("checkpoint", "tower", "sizes"),
    [
        ("internvl", None, (1, 2, 4)),
        ("bunny", "siglip_tower", (2, 4, 1)),
        ("llava_orig_bin", "clip_tower", (2, 2, 2)),
    ],
)
def test_pieces_of_any_size_make_the_same_arrays(goldens, monkeypatch, checkpoint, tower, sizes):
    """Fused tensors (internvl), a tower in files of its own (bunny), torch's archives; pieces that end anywhere."""
    folder, options = goldens / "ckpt" / checkpoint, {"vision_dir": tower and goldens / "ckpt" / tower}
    options["dtype"] = "bfloat16" if checkpoint == "bunny" else "float32"
    expected = load(folder, **options)
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read._PIECE", 100)
    assert_equal(expected, load(folder, **options))
    assert_equal(expected, load_on(make_mesh(*sizes), folder, **options))


def test_per_layer_inputs_are_split_where_the_mesh_divides_them(goldens):
    """The table of Gemma 4, the largest weight: 10 channels a layer, over 2 devices and not over 4."""
    folder = goldens / "families/gemma4/ckpt"
    ids = np.random.default_rng(0).integers(9, 400, (8, 7))
    one = load(folder)
    for fsdp, channels in ((2, 5), (4, 10)):
        spread = load(folder, mesh=make_mesh(8 // fsdp, fsdp, 1))
        table = spread.params["text"]["extra_inputs"]["table"]["weight"]
        assert table.addressable_shards[0].data.shape == (422, 9, channels)
    np.testing.assert_allclose(forward(spread, ids)[0], forward(one, ids)[0], **close)
