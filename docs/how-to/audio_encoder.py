"""Llama that hears: an audio encoder beside the decoder, whose layers, heads and neurons are pruned like a tower's."""

import dataclasses

import vlmprune_jax as vp
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import BlockConfig, Layer
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.models.layers import Leaf, Projection, activation
from vlmprune_jax.io.families.decoders import text_weights
from vlmprune_jax.io.families.fields import check_fields
from vlmprune_jax.io.families.llama_like import llama_like
from vlmprune_jax.io.families.shapes import layers_to_hf, token_ids
from vlmprune_jax.io.families.table import Weight


@dataclasses.dataclass(frozen=True)
class Audio(vp.Encoder):
    """Facts of the encoder beside those of every encoder; an item is float[positions, channels]."""

    channels: int


class AudioEncoder(vp.EncoderModule):
    """Frames of a spectrogram -> blocks -> tokens of the decoder, one per frame."""

    def __init__(self, cfg, text_size):
        super().__init__(cfg, text_size)
        sizes = {"encoder": cfg.hidden_size, "channel": cfg.channels, "position": cfg.positions, "embed": text_size}
        self.frames = Projection(sizes, ("encoder",), ("channel",), bias=False)
        self.places = Leaf(sizes, ("position", "encoder"))
        self.to_text = Projection(sizes, ("embed",), ("encoder",), bias=False)

    def embed(self, items):
        return self.frames(items) + self.places.weight.get_value()[None]

    def project(self, x):
        return self.to_text(activation("gelu")(x))


vp.encoders[Audio] = AudioEncoder


def from_hf(config, vision):
    text, audio = llama_like(config["text"], "llama"), config["audio"]
    check_fields(audio, "config.json", "audio.")  # bounds the depth before layers are made
    mixer = Attention(audio["heads"], audio["heads"], head_dim=audio["head_dim"])
    layer = Layer(mixer, Dense(audio["neurons"], gated=False, activation="gelu"))
    encoder = Audio(
        audio["width"], (layer,) * audio["depth"], BlockConfig(1e-5), array="input_features", channels=audio["mels"],
        token_id=audio["token_id"], tokens=audio["frames"], positions=audio["frames"],
    )  # fmt: skip
    return ModelConfig("hearing", "transformers", text, encoders=(("audio", encoder),), **token_ids(config["text"]))


def to_hf(cfg, source):
    layers = cfg.stack("audio").layers
    sizes = {"depth": len(layers), "heads": layers[0].mixer.q_heads, "neurons": layers[0].sizes["mlp"]}
    return {**source, "text": layers_to_hf(cfg.text, source["text"]), "audio": {**source["audio"], **sizes}}


def weights(cfg):
    layer = ["layer_norm1", "layer_norm2", "mlp/fc1", "mlp/fc2"]
    layer += [f"self_attn/{name}_proj" for name in ("q", "k", "v", "out")]
    paths = ["frames", "to_text", "places", *(f"layers/{{i}}/{name}" for name in layer)]
    table = [Weight(f"audio/{path}", f"audio.{path}".replace("/", ".")) for path in paths]
    return text_weights(cfg.text) + table


vp.families["hearing"] = dataclasses.replace(
    vp.families["llama"], name="hearing", model_types=("hearing",), from_hf=from_hf, to_hf=to_hf, weights=weights,
    decoder=None, stock=None, text_section="text",
)  # fmt: skip
