"""vlmprune env: versions, devices and installed packages of this machine, for a bug report.

Also shows the environment variables that jax and the hub client read.
"""

from __future__ import annotations

from typing import Any

_REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "safetensors",
             "huggingface_hub", "numpy")  # fmt: skip
_OPTIONAL = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "compressed-tensors", "lmms_eval", "datasets",
             "gcsfs", "easy-vqa", "wandb", "trackio")  # fmt: skip
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE", "HF_HUB_OFFLINE", "HF_HOME", "VLMPRUNE_")


def run(flags: Any) -> None:
    """Print versions, processor, devices and environment variables, for bug reports."""
    import os
    import platform

    from vlmprune_jax.core.mesh.machine import cores, cpu
    from vlmprune_jax.run.workdir.content import commit, versions

    installed = versions((*_REQUIRED, *_OPTIONAL))
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]
    print("vlmprune  ", ", commit ".join(filter(None, (version(), commit()))))
    print("python    ", f"{installed['python']}, {platform.platform()}")
    print("processor ", f"{cpu()}, {cores()} cores")
    print("devices   ", _devices())
    print("packages  ", ", ".join(f"{name} {number}" for name, number in installed.items() if name != "python"))
    print("missing   ", ", ".join(name for name in _OPTIONAL if name not in installed))
    print("variables ", ", ".join(variables))


def version() -> str:
    """Return the version of vlmprune-jax."""
    from vlmprune_jax.run.workdir.content import versions

    return versions(("vlmprune-jax",)).get("vlmprune-jax", "not installed")


def _devices() -> str:
    import jax

    from vlmprune_jax.base.errors import UserError
    from vlmprune_jax.core.mesh.machine import processor
    from vlmprune_jax.core.mesh.mesh import start_devices

    try:
        start_devices()
    except UserError as error:
        return f"none: {error}"
    return f"{jax.device_count()} on {jax.default_backend()}: {processor()}"
