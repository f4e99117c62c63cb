"""Llama whose MLP has groups of neurons with a learned scale each; a group is pruned as a whole."""

import dataclasses
from dataclasses import dataclass

import jax
from flax import nnx

import vlmprune_jax as vp
from vlmprune_jax.core.models.layers import Leaf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import llama_like
from vlmprune_jax.io.families.table import LLAMA_NAMES, Decoder


@dataclass(frozen=True)
class Grouped(vp.ChannelMixer):
    """Facts of the part; `groups` is prunable, and so has a size in plans and scores."""

    module = "mlp"
    axes = (vp.Axis("groups", "neuron groups", channels="group"),)
    fixed_axes = (("group", "neurons"),)  # an axis of the weights, and the field with its size

    groups: int
    neurons: int  # per group


class GroupedMlp(nnx.Module):
    """down(scale of the group * silu(gate(x)) * up(x))."""

    writer = "down_proj"

    def __init__(self, build):
        inner, outer = ("groups", "group"), (build.names.axis,)
        for name, out, into in (("gate_proj", inner, outer), ("up_proj", inner, outer), ("down_proj", outer, inner)):
            setattr(self, name, build.projection(name, out, into))
        self.scale = Leaf(build.sizes, ("groups",))

    def __call__(self, x, ctx):
        hidden = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        hidden = hidden * self.scale.weight.get_value()[None, None, :, None]
        return self.down_proj(hidden), hidden


vp.parts[Grouped] = GroupedMlp


def from_hf(config):
    text = llama_like(config, "grouped")
    channel = Grouped(groups=config["num_groups"], neurons=config["group_size"])
    return text.with_layers([dataclasses.replace(layer, channel=channel) for layer in text.layers])


def to_hf(text, source):
    layer = text.layers[0]
    heads = {"num_attention_heads": layer.mixer.q_heads, "num_key_value_heads": layer.mixer.kv_heads}
    groups = {"num_groups": layer.channel.groups, "intermediate_size": layer.channel.groups * layer.channel.neurons}
    return {**source, **heads, **groups, "num_hidden_layers": len(text.layers), "head_dim": layer.mixer.head_dim}


names = LLAMA_NAMES | {"layers/{i}/mlp/scale/weight": "layers.{i}.mlp.scale"}
vp.families["grouped"] = decoder_family(Decoder("grouped", "GroupedForCausalLM", from_hf, to_hf, names))
