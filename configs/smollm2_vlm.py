"""A vision-language model with a pretrained language model, for study 2: SmolLM2-135M behind the demo teacher's tower.

  vlmprune pretrain --config=configs/smollm2_vlm.py:DIR --workdir=runs/smollm2_vlm

DIR: SmolLM2-135M (by default where the tests make it, tests/cases/smollm2.py), or another decoder that this package
reads. As LLaVA is made: the projector alone learns captions, then the decoder with it the questions, ten of an image a
row; the tower stays as it is. runs/smollm2_vlm/teacher is a LLaVA folder; its prompt is LLaVA's, with the language
model's end of text in place of `</s>`.
"""

from importlib import resources

from ml_collections import ConfigDict


def get_config(folder: str = ".cache/smollm2-135m") -> ConfigDict:
    """The two folders, and LLaVA's two stages."""
    config = ConfigDict()
    config.seed = 0
    teacher = resources.files("vlmprune_jax") / "demo" / "teacher"
    config.joined = ConfigDict({"language": folder, "tower": str(teacher)})
    common = {
        "augment": "flip_shift",
        "words": 0,
        "decoder_layers": 1000,  # all that there are
        "keeps": ".*",
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "compute_dtype": "float32",
        "save_every": 50,
    }
    align = {
        **common,
        "name": "align",
        "records": "train_captions",
        "turns_per_row": 1,
        "trainable": "projector",
        "learning_rate": 1e-3,
        "projector_learning_rate": 1e-3,
        "batch_size": 32,
        "steps": 120,
    }
    questions = {
        **common,
        "name": "questions",
        "records": "train_multi_turn",
        "turns_per_row": 10,
        "trainable": "decoder",
        "learning_rate": 2e-4,
        "projector_learning_rate": 1e-3,
        "batch_size": 16,
        "steps": 250,
    }
    config.stages = tuple(ConfigDict(stage) for stage in (align, questions))
    return config
