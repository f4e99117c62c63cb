"""Training what pruning lost: losses, what trains, the step, checkpoints and the loop."""

from vlmprune_jax.errors import Stopped
from vlmprune_jax.recovery.loop import RecoverConfig, recover
from vlmprune_jax.recovery.losses import LossConfig, from_alpha
from vlmprune_jax.recovery.trainable import add_lora, merge_lora

__all__ = ["LossConfig", "RecoverConfig", "Stopped", "add_lora", "from_alpha", "merge_lora", "recover"]
