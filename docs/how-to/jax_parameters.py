# jax_parameters.py
"""One safetensors file by parameter path, for training code in JAX that has its own model."""

from dataclasses import dataclass

import numpy as np
from safetensors.flax import load_file

import vlmprune_jax as vp
from vlmprune_jax.base.settings import setting
from vlmprune_jax.base.weight_files import DTYPES, file_name
from vlmprune_jax.core.models.lazy import to_host
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.io.checkpoints.disk.tensors import weight, write_weights


@dataclass(frozen=True)
class Options:
    dtype: str = setting("bfloat16", "Data type of the weights.", choices=tuple(DTYPES))
    prefix: str = setting("", "Text before the path of every parameter.")


def prepare(model, origin, options):
    name, dtype = file_name(options.dtype), DTYPES[options.dtype]
    flat = {options.prefix + path: array for path, array in flatten(model.params).items()}
    tensors = [weight(p, name, x.shape, lambda x=x: to_host(x, None).astype(dtype)) for p, x in flat.items()]
    return vp.Contents(tensors, lambda folder: write_weights(tensors, folder, 2**40), lambda folder: "`load_file(...)`")


def check(model, folder, origin, options):
    stored, flat = load_file(folder / "model.safetensors"), flatten(model.params)
    params = unflatten({path: stored[options.prefix + path].astype(x.dtype) for path, x in flat.items()})
    logits = [vp.forward(vp.Model(p, model.cfg), np.arange(8)[None])[0] for p in (model.params, params)]
    difference = float(abs(logits[0] - logits[1]).max())
    if not difference <= 0.1:
        raise vp.UserError(f"{folder}: logits differ from the model's by {difference:.2g}: do not use this folder")
    return {"backend": "jax", "max_abs_logit_difference": difference, "tolerance": 0.1}


vp.formats["jax_parameters"] = vp.Format(Options, prepare, check, library="jax")
