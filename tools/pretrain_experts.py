"""A LLaVA whose decoder has 8 experts per layer (3.6 M parameters), for the study of expert pruning.

python tools/pretrain.py --config=tools/pretrain_experts.py --workdir=runs/experts

The demo's teacher is upcycled: each MLP becomes 8 noisy copies with a random router, and a token uses 2 (Komatsuzaki
et al. 2022, arXiv 2212.05055). Then all parts learn questions about images and, in half of the rows, English text.
"""

from importlib import resources

from ml_collections import ConfigDict


def get_config(folder: str = "") -> ConfigDict:
    """Return the folder of the dense model (default: the demo's teacher) and the training stage."""
    config = ConfigDict()
    config.seed = 0
    dense = folder or str(resources.files("vlmprune_jax") / "demo" / "teacher")
    config.upcycled = ConfigDict({"dense": dense, "experts": 8, "top_k": 2, "noise": 0.5})
    mixed = {
        "name": "mixed",
        "records": "train_multi_turn",
        "turns_per_row": 3,
        "words": 0,
        "decoder_layers": 10,
        "augment": "flip_shift",
        "keeps": ".*",
        "text_share": 0.5,
        "trainable": "all",
        "batch_size": 64,
        "learning_rate": 1e-3,
        "projector_learning_rate": 1e-3,
        "weight_decay": 0.05,
        "b2": 0.98,
        "warmup_ratio": 0.05,
        "compute_dtype": "float32",
        "steps": 700,
        "save_every": 50,
    }
    config.stages = (ConfigDict(mixed),)
    return config
