"""vlmprune chat MODEL [MODEL ...] [FILE ...] "QUESTION": ask models a question, for example before and after pruning.

Models are Hugging Face folders or hub ids; files are images and videos. Answers are greedy.
  vlmprune chat DIR/llava-1.5-7b-hf runs/llava/export cat.png "What animal is this?"
  vlmprune chat DIR/Qwen3-VL-2B-Instruct clip.mp4 "What happens?" --video_frames=8
"""

from __future__ import annotations

import os
from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.run.cli.flags import Flags

TAKES_ARGUMENTS = True


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune chat`."""
    absl_flags.DEFINE_string("vision_dir", None, "vision tower folder (original LLaVA, Bunny)", flag_values=values)
    dtypes = ["float32", "bfloat16", "float16"]
    absl_flags.DEFINE_enum("dtype", "float32", dtypes, "data type of the weights in memory", flag_values=values)
    options: Any = {"lower_bound": 1, "flag_values": values}
    absl_flags.DEFINE_integer("max_new_tokens", 64, "maximum length of an answer (tokens)", **options)
    absl_flags.DEFINE_integer("video_frames", None, "frames to sample from a video (default: the folder's)", **options)


def run(flags: Any) -> None:
    """Print each model's answer to one question about images or videos (`vlmprune chat`)."""
    from vlmprune_jax.base.console import make_reporter
    from vlmprune_jax.base.errors import UserError
    from vlmprune_jax.core.mesh.mesh import start_devices
    from vlmprune_jax.core.models.params import count_params
    from vlmprune_jax.io.checkpoints.read import load, resolve
    from vlmprune_jax.io.data.media import is_file
    from vlmprune_jax.run.evaluation.answer import answer

    *names, question = flags.args or [""]
    files = [name for name in names if is_file(name)]
    models = [name for name in names if name not in files]
    usage = 'vlmprune chat MODEL image.png "What is this?"'
    if os.path.exists(question) or (" " not in question and is_file(question)):
        raise UserError(f"chat: the last argument is {question}, not a question: add one ({usage})")
    if not models or not question:
        raise UserError(f"chat takes models, images or videos and a question: {usage}")
    if missing := [name for name in files if not os.path.isfile(name)]:
        raise UserError(f"{missing[0]}: no such file: name an image or a video that exists")
    for name in models:
        resolve(name)
    start_devices()
    reporter = make_reporter(True)
    for name in models:
        model = load(name, vision_dir=flags.vision_dir, dtype=flags.dtype)
        options = {"source_dir": name, "vision_dir": flags.vision_dir, "max_new_tokens": flags.max_new_tokens}
        options |= {} if flags.video_frames is None else {"video_frames": flags.video_frames}
        text = answer(model, files or None, question, **options)
        reporter.say(f"{name} ({count_params(model):,} parameters)")
        reporter.say(f"  {text}")
