"""Section "Loading" of the model card of GGUF files: commands, contents, and differences in llama.cpp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.export.gguf_model import GgufFile
from vlmprune_jax.models.params import count_params


def gguf_loading(files: Sequence[GgufFile], cfg: ModelConfig, imatrix: GgufFile | None = None) -> str:
    """Return the section; `cfg` is the model before padding, `imatrix` the importance file if there is one."""
    text, tower = files[0], files[1] if len(files) > 1 else None
    names = f"-m {text.name}" + (f" --mmproj {tower.name}" if tower else "")
    rows = [f"| `{one.name}` | {one.architecture} | {_types(one)} |" for one in files]
    parts = [
        f"```\nllama-server {names}\n```",
        "\n".join(["| file | architecture | tensors |", "|---|---|---|", *rows]),
    ]
    kept = [f"`{key}`" for one in files for key in one.kept]
    if kept:
        parts.append(f"Kept in F16, since their rows are no whole blocks of 32 values: {', '.join(kept)}.")
    padded = cfg.with_layers(text.layers)
    if tower is not None:
        padded = padded.with_layers(tower.layers, "vision")
    before, after = count_params(cfg), count_params(padded)
    if after != before:
        parts.append(
            f"Layers were padded with zero heads and neurons to what `{text.architecture}` holds: the same function, "
            f"with {after:,} parameters in the files and in memory instead of {before:,}."
        )
    parts.append(_k_quants(text.name, imatrix))
    remarks = [f"- {remark}" for one in files for remark in one.remarks]
    if remarks:
        parts.append("What differs in llama.cpp:\n\n" + "\n".join(remarks))
    return "\n\n".join(parts)


def _k_quants(name: str, imatrix: GgufFile | None) -> str:
    """Return the instructions for k-quants, which llama.cpp's own tool makes."""
    base = name.rpartition("-")[0]
    if imatrix is None:
        return (
            "K-quants (`Q4_K_M`, ...) are made by llama.cpp's own tool, from a file that is not quantised yet "
            f'(`quantize="none"`):\n\n```\nllama-quantize {base}-BF16.gguf {base}-Q4_K_M.gguf Q4_K_M\n```'
        )
    return (
        "K-quants (`Q4_K_M`, ...) are made by llama.cpp's own tool. It weighs each channel by how large it was in "
        f"{imatrix.fields['imatrix.chunk_count']:,} calibration records:\n\n"
        f"```\nllama-quantize --imatrix {imatrix.name} {name} {base}-Q4_K_M.gguf Q4_K_M\n```"
    )


def _types(one: GgufFile) -> str:
    found = Counter(tensor.dtype for tensor in one.tensors)
    size = sum(tensor.n_bytes for tensor in one.tensors)
    return f"{', '.join(f'{n} x {kind}' for kind, n in found.most_common())}; {size / 1e6:,.1f} MB"
