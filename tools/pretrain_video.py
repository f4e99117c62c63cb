"""A small Qwen3-VL for the study of time in videos, trained on moving shapes.

python tools/moving_shapes.py runs/moving-shapes --train=1500 --test=150
python tools/pretrain.py --config=tools/pretrain_video.py --workdir=runs/qwen_video

Eight frames of 32 x 32 pixels are four temporal patches of four tokens. The tower starts as that of the demo's teacher.
About 10 minutes on one core of an AMD EPYC. The model learns colours, halves and axes of movements, but no order.
"""

from ml_collections import ConfigDict
from pretrain_tokens import get_config as tokens_config

SIDE, FRAMES, STEPS = 32, 8, 1000


def get_config(folder: str = "runs/moving-shapes") -> ConfigDict:
    """Return the folder of moving_shapes.py, the architecture (see pretrain_tokens.py) and the training stage."""
    config = tokens_config()
    config.videos = folder
    config.architecture.pixels = {"least": SIDE**2, "most": 64**2, "clip": FRAMES * SIDE**2}
    stage = config.stages[-1]
    stage.sides = ()
    stage.update(
        name="videos",
        records="videos",
        turns_per_row=4,
        augment="none",  # a mirrored clip has other answers
        trainable="all",
        batch_size=32,
        steps=STEPS,
        learning_rate=2e-3,
        projector_learning_rate=2e-3,
        remat="none",
    )
    config.stages = (stage,)
    return config
