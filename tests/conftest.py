"""What every test runs under: 8 CPU devices, strict numerics, no network; and the fixtures that several topics share.

The environment is set before the first `import jax`, which reads it once; the workers of pytest-xdist and the processes
that tests start inherit it. Warnings are errors: pyproject.toml has the list of exceptions, each with its reason.
"""

import os
import tempfile
from importlib.metadata import version

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Most of a test's time is compiling what then runs for milliseconds: leave out what only makes programs faster.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # A pool of two threads deadlocks eight devices: one waits in a collective where another begins an independent one.
    "PJRT_NPROC": "16",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry:UserWarning",  # pyproject.toml says why
    "HF_HUB_OFFLINE": "1",  # a test that needs a hub is a defect: fail at once instead of timing out
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its thread pool warns when a test starts a subprocess by fork
    "MPLBACKEND": "Agg",
}
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Programs compile in a third of the processor time: fused loops are written for LLVM directly instead of through
    # MLIR's passes, and a program is one LLVM module, not 32. What the numbers are compared with stays as it is.
    # Later versions of XLA lack the first flag, and an unknown flag ends the process.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
    "--xla_cpu_parallel_codegen_split_count=1",
    # Eight device threads on two busy cores can wait long for each other; XLA's 40 s limit would end the process.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
if "PYTEST_XDIST_WORKER" not in os.environ:
    _SHARED = tempfile.TemporaryDirectory(prefix="vlmprune-tests-")
    os.environ.update(_ENVIRONMENT, VLMPRUNE_TESTS_SHARED=_SHARED.name)
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS]).strip()
    # Equal programs compile once in a session; `make test` sets it, and so keeps them for the next session.
    _CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{_SHARED.name}/jax")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(_CACHE)  # some tests start processes in other folders

import gc  # noqa: E402
import itertools  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from repository import GOLDENS  # noqa: E402
from torch_compat import TorchOutputs, TorchServers  # noqa: E402
from xdist.remote import Producer  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402
from xdist.workermanage import WorkerController  # noqa: E402

gc.set_threshold(100_000, 50, 100)  # traced programs are many long-lived objects, which every collection visits
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Start, once a session, what its workers share."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.add_cleanup(_SHARED.cleanup)
        config.add_cleanup(TorchServers(Path(__file__).parents[1], Path(_SHARED.name)).close)


# Cases of some seconds that nothing else in `make test` rests on, or whose like runs there: file -> ends of names.
_SLOW_CASES = {
    "run/demo/test_demo.py": ("counts_and_images",),
    "core/mesh/test_mesh.py": ("not_there_is_one_line",),
    "run/evaluation/test_runner.py": ("equal_rows_alone",),
    "io/exports/test_gguf_families.py": (
        "[gemma4_moe-experts]", "[internvl_moe-all]", "[qwen3_5_moe-]", "[qwen3_5_moe-all]", "[qwen3_5_moe-depth]",
        "[qwen3_5_r1-all]", "[qwen3_5_r3-all]", "[qwen3_5_r3-value_heads_2]",
    ),
    "io/families/test_experts.py": (
        "each[gemma4_moe-w8a8]", "each[qwen3_5_moe-w8a8]", "not_saved_apart",
    ),
    "io/families/test_video.py": ("texts[gemma4]"),
    "core/prune/test_repair.py": (
        "[qwen3_5_moe]", "[gemma4_moe]", "the_whole_model", "float64[4]", "stock_model_that_results",
    ),
    "core/prune/test_reconstruction.py": ("on_the_device[qwen3_vl]", "on_the_device[gemma4]"),
    "run/stages/test_preflight.py": ("[demo_reconstruct]", "[demo]"),
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow cases, and run tests marked `slow` last, so that one run reports the quick ones first."""
    for item in items:
        if item.name.endswith(_SLOW_CASES.get(str(item.path.relative_to(Path(__file__).parent)), ())):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


class _FilesInOrder(LoadScopeScheduling):
    """Hands out consecutive tests of one file together, in the order of collection.

    So what the tests of a module share is made once, its quick tests come with the other quick ones, and a module's
    tests see the same order and the same fixtures as in one process.
    """

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        super().add_node_collection(node, collection)
        runs = itertools.groupby(collection, key=lambda nodeid: nodeid.split("::")[0])
        self._scopes = {nodeid: f"{number} {file}" for number, (file, run) in enumerate(runs) for nodeid in run}

    def _split_scope(self, nodeid: str) -> str:
        return self._scopes[nodeid]

    # pytest-xdist 3.8 waits forever for a dead worker's successor (pytest-dev/pytest-xdist#1327 and #1378).
    def remove_node(self, node: WorkerController) -> str | None:
        """Hand out what a dead worker has not begun; return the test in which it died."""
        work = self.assigned_work.pop(node)
        left = [(scope, test) for scope, unit in work.items() for test, done in unit.items() if not done]
        for scope, test in left[1:]:
            self.workqueue.setdefault(scope, {})[test] = False
        for other in self.assigned_work:
            self._reschedule(other)
        return left[0][1] if left else None

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        if not self.workqueue and not node.shutting_down:
            node.shutdown()  # a worker begins its last test when it knows that no other follows


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """`pytest -n 2` schedules so, whatever --dist says."""
    config.option.loadscopereorder = False
    return _FilesInOrder(config, log)


@pytest.fixture(autouse=True, scope="module")
def _few_compiled_functions() -> Iterator[None]:
    """Forget compiled functions before they fill the process's memory maps.

    XLA:CPU maps several regions per function and Linux allows 65,530 a process: one suite of 1,300 tests reaches that,
    and LLVM aborts. Modules share few functions, and the session's cache has what is asked for again.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture
def optimized() -> Iterator[None]:
    """XLA optimises again: for a test that computes longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of tiny checkpoints and reference outputs; VLMPRUNE_GOLDENS overrides tests/goldens."""
    assert (GOLDENS / "ckpt").is_dir(), f"no golden data in {GOLDENS}: check out tests/goldens or set VLMPRUNE_GOLDENS"
    return GOLDENS


@pytest.fixture(scope="session")
def torch_outputs():
    """Callable (folder, inputs, *, class_name, version, ...) -> numpy outputs of stock transformers on torch.

    See torch_compat.TorchOutputs.__call__. One process per transformers version serves the whole session.
    """
    outputs = TorchOutputs(Path(os.environ["VLMPRUNE_TESTS_SHARED"]))
    yield outputs
    outputs.close()
