"""PyTorch loader of decoders whose layers have unequal widths: stock transformers classes, resized layer by layer.

vlmprune-jax ships this file with exports of that kind. `per_layer_shapes` in config.json (in `text_config` of a
vision-language model) lists [query heads, key/value heads, MLP neurons] of every decoder layer. `PerLayerX` builds its
stock parent X at the widest shape and then cuts every layer to its own widths, before any weight is loaded; nothing
else differs. Works with transformers 4.57 and 5.
"""

from typing import Any

import transformers
from torch import nn

PREFIX = "PerLayer"


class LayerConfig:
    """Config of one decoder layer: the layer's own head counts, all other attributes from the model's config."""

    def __init__(self, config, **overrides):
        self.__dict__.update(overrides, _model_config=config)

    def __getattr__(self, name):
        if name.startswith("__") or name == "_model_config":  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self._model_config, name)


def cut(linear, rows=None, columns=None):
    """Keep the first `rows` and `columns` of a linear layer's weight (None keeps all)."""
    have_rows, have_columns = linear.weight.shape
    rows, columns = have_rows if rows is None else rows, have_columns if columns is None else columns
    if rows > have_rows or columns > have_columns:
        raise ValueError(f"per_layer_shapes in config.json: a layer of {rows} x {columns} is wider than the widest")
    linear.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())
    linear.out_features, linear.in_features = rows, columns


def resize_layer(layer, q_heads, kv_heads, mlp):
    """Resize the projections of one decoder layer to the layer's own numbers of heads and neurons."""
    attention, head = layer.self_attn, layer.self_attn.head_dim
    sizes = {
        attention: {
            "q_proj": (q_heads * head, None),
            "k_proj": (kv_heads * head, None),
            "v_proj": (kv_heads * head, None),
            "qkv_proj": ((q_heads + 2 * kv_heads) * head, None),
            "o_proj": (None, q_heads * head),
            "dense": (None, q_heads * head),
        },
        layer.mlp: {
            "gate_proj": (mlp, None),
            "up_proj": (mlp, None),
            "gate_up_proj": (2 * mlp, None),
            "down_proj": (None, mlp),
            "fc1": (mlp, None),
            "fc2": (None, mlp),
        },
    }
    for module, projections in sizes.items():
        for name, child in module.named_children():
            if name in projections:
                cut(child, *projections[name])
            elif isinstance(child, nn.Linear):
                raise ValueError(f"{type(module).__name__}: this file does not know how to cut its {name}")
    heads = {"num_attention_heads": q_heads, "num_key_value_heads": kv_heads}
    attention.config = LayerConfig(attention.config, intermediate_size=mlp, **heads)
    counts = {"num_heads": q_heads, "num_key_value_groups": q_heads // kv_heads, **heads}
    for name, value in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    if hasattr(layer.mlp, "intermediate_size"):
        layer.mlp.intermediate_size = mlp


class PerLayerWidths(nn.Module):
    """Mixin that gives a stock transformers class the layer widths in config.json's `per_layer_shapes`."""

    # save_pretrained then puts this file into the new folder, which transformers 4 would not do by itself
    _auto_class: Any
    model: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        shapes = getattr(config.get_text_config(), "per_layer_shapes", None)
        names = ("language_model", "text_model")
        layers = next((getattr(self.model, name) for name in names if hasattr(self.model, name)), self.model).layers
        if shapes is None or len(shapes) != len(layers):
            problem = "no per_layer_shapes" if shapes is None else f"{len(shapes)} per_layer_shapes"
            raise ValueError(f"config.json has {problem} for {len(layers)} layers")
        for layer, shape in zip(layers, shapes, strict=True):
            resize_layer(layer, *shape)

    @classmethod
    def is_custom_code(cls):
        """Return False, so that transformers 5 renames old checkpoint keys as it does for the stock class."""
        return False


def __getattr__(name: str) -> Any:
    """Create class `PerLayerX`, named in `auto_map`: transformers' class X with different widths per layer."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    auto = "AutoModelForCausalLM" if name.endswith("ForCausalLM") else "AutoModelForImageTextToText"
    per_layer_class = type(name, (PerLayerWidths, stock), {"__module__": __name__, "_auto_class": auto})
    _rename_as(stock.__name__, name)
    globals()[name] = per_layer_class  # one class, whoever asks
    return per_layer_class


def _rename_as(stock: str, name: str) -> None:
    """Register transformers 5's checkpoint key renamings of class `stock` also for class `name`."""
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:  # version 4, whose classes hold their renamings
        return
    renamings = get_checkpoint_conversion_mapping(stock)
    if renamings is not None:
        register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
