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
    rows = [f"| `{file.name}` | {file.architecture} | {_types(file)} |" for file in files]
    parts = [
        f"```\nllama-server {names}\n```",
        "\n".join(["| file | architecture | tensors |", "|---|---|---|", *rows]),
    ]
    unquantised = [f"`{key}`" for file in files for key in file.unquantised]
    if unquantised:
        parts.append(f"Kept in F16, because their rows are not whole blocks of 32 values: {', '.join(unquantised)}.")
    padded = cfg.with_layers(text.layers)
    if tower is not None:
        padded = padded.with_layers(tower.layers, "vision")
    before, after = count_params(cfg), count_params(padded)
    if after != before:
        parts.append(
            f"Layers were padded with zero heads and neurons to widths of `{text.architecture}`: the same function, "
            f"with {after:,} parameters in files and memory instead of {before:,}."
        )
    parts.append(_k_quants(text.name, imatrix))
    remarks = [f"- {remark}" for file in files for remark in file.remarks]
    if remarks:
        parts.append("Differences in llama.cpp:\n\n" + "\n".join(remarks))
    return "\n\n".join(parts)


def _k_quants(name: str, imatrix: GgufFile | None) -> str:
    """Return the instructions for k-quants, which llama.cpp's own tool makes."""
    base = name.rpartition("-")[0]
    if imatrix is None:
        return (
            "llama.cpp's own tool makes K-quants (`Q4_K_M`, ...) from a file without quantisation "
            f'(`quantize="none"`):\n\n```\nllama-quantize {base}-BF16.gguf {base}-Q4_K_M.gguf Q4_K_M\n```'
        )
    return (
        "llama.cpp's own tool makes K-quants (`Q4_K_M`, ...). It weights each channel by its mean square on "
        f"{imatrix.fields['imatrix.chunk_count']:,} calibration records:\n\n"
        f"```\nllama-quantize --imatrix {imatrix.name} {name} {base}-Q4_K_M.gguf Q4_K_M\n```"
    )


def _types(file: GgufFile) -> str:
    counts = Counter(tensor.dtype for tensor in file.tensors)
    size = sum(tensor.n_bytes for tensor in file.tensors)
    return f"{', '.join(f'{n} x {kind}' for kind, n in counts.most_common())}; {size / 1e6:,.1f} MB"
