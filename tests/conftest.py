"""What every test runs under: 8 CPU devices, strict numerics, no network; and the fixtures that several topics share.

The environment is set before the first `import jax`, which reads it once. Warnings are errors: pyproject.toml has the
list of exceptions, each with its reason.
"""

import os

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",  # a test that needs a hub is a defect: fail at once instead of timing out
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its thread pool warns when a test starts a subprocess by fork
    "MPLBACKEND": "Agg",
}
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Eight device threads on two busy cores can wait long for each other; XLA's 40 s limit would end the process.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ.update(_ENVIRONMENT)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS]).strip()

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from torch_compat import TorchWorkers  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests marked `slow` last, so that one run reports the quick ones first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def _few_compiled_functions() -> Iterator[None]:
    """Forget compiled functions before they fill the process's memory maps.

    XLA:CPU maps several regions per function and Linux allows 65,530 a process: one suite of 1,300 tests reaches that,
    and LLVM aborts. Below 25,000 no test loses what the one before it compiled.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of tiny checkpoints and reference outputs; VLMPRUNE_GOLDENS overrides tests/goldens."""
    folder = Path(os.environ.get("VLMPRUNE_GOLDENS", Path(__file__).parent / "goldens"))
    assert (folder / "ckpt").is_dir(), f"no golden data in {folder}: check out tests/goldens or set VLMPRUNE_GOLDENS"
    return folder


@pytest.fixture(scope="session")
def torch_outputs():
    """Callable (folder, inputs, *, class_name, version, ...) -> numpy outputs of stock transformers on torch.

    See torch_compat.TorchWorkers.__call__. One process per transformers version lives as long as the session.
    """
    workers = TorchWorkers(Path(__file__).parents[1])
    yield workers
    workers.close()
