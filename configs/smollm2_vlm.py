"""A vision-language model with a pretrained language model, for study 2: a SmolVLM of SmolLM2-135M.

  python tools/pretrain.py --config=configs/smollm2_vlm.py:DIR --workdir=runs/smollm2_vlm

DIR: SmolLM2-135M (by default where the tests make it, tests/cases/smollm2.py), or another Llama. First what sees, the
tower of the demo's teacher and the projector, learns captions before a decoder that stays as it is, then all does; the
decoder learns to compare from questions about words; then all of it answers questions about images, in the end with
rows of English text between them.
runs/smollm2_vlm/teacher is a folder of SmolVLM's class, with its prompt and its processor.
"""

from importlib import resources

from ml_collections import ConfigDict


def get_config(folder: str = ".cache/smollm2-135m") -> ConfigDict:
    """The two folders, and the stages."""
    config = ConfigDict()
    config.seed = 0
    teacher = resources.files("vlmprune_jax") / "demo" / "teacher"
    config.joined = ConfigDict({"language": folder, "tower": str(teacher)})
    common = {
        "augment": "flip_shift",
        "words": 0,
        "decoder_layers": 1000,  # all that there are
        "keeps": ".*",
        "learning_rate": 3e-4,
        "projector_learning_rate": 1e-3,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "compute_dtype": "float32",
        "save_every": 40,
    }
    align = {
        **common,
        "name": "align",
        "records": "train_captions",
        "turns_per_row": 1,
        "trainable": (("(vision|projector)/.*", True),),
        "batch_size": 32,
        "steps": 100,
    }
    captions = {**align, "name": "captions", "trainable": "all", "steps": 60}
    # Comparing a question's word with what is there is learnt in minutes from "red circle" in words and questions of
    # which none is answered by its wording. Not begun to be learnt, in as long or longer: from images, from several
    # questions in a row (whose words are there as well), with negations from the start (decision 89).
    compare = {
        **common,
        "name": "compare",
        "records": "train_balanced",
        "turns_per_row": 1,
        "words": 2,
        "augment": "none",
        "trainable": (("text/.*", True),),
        "batch_size": 32,
        "steps": 60,
    }
    # Then all questions, and as many words as an image has tokens.
    words = {**compare, "name": "words", "records": "train", "words": 16, "steps": 80}
    # The image learns to be what the decoder reads as words. Words in every other row keep the decoder from forgetting
    # how to compare before there is anything to compare.
    see = {**words, "name": "see", "also_images": True, "augment": "flip_shift", "trainable": "all", "steps": 150}
    see |= {"learning_rate": 2e-4}
    questions = {**see, "name": "questions", "words": 0, "also_images": False, "steps": 120}
    # Answers of one word have made it forget English (perplexity of 4,116 on text, 15 before): half of what follows is.
    english = {**questions, "name": "english", "text_share": 0.5, "steps": 80, "projector_learning_rate": 2e-4}
    # When comparing is learnt is chance, and another processor's rounding draws anew (decision 89).
    learnt = {"until_loss": 0.05, "runs": 5}
    stages = (align, captions, {**compare, **learnt}, {**words, **learnt}, see, questions, english)
    config.stages = tuple(ConfigDict(stage) for stage in stages)
    return config
