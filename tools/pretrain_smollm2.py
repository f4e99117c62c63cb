"""A vision-language model with a pretrained language model, for study 2: a SmolVLM with SmolLM2-135M.

  python tools/pretrain.py --config=tools/pretrain_smollm2.py:DIR --workdir=runs/smollm2_vlm

DIR is SmolLM2-135M (default: the folder that tests/cases/smollm2.py makes) or another Llama. Stages: the demo teacher's
tower and the projector learn captions with a frozen decoder, then all parts; the decoder learns to compare
from questions about words; then all parts learn questions about images, at the end mixed with English text.
runs/smollm2_vlm/teacher is a SmolVLM checkpoint with prompt template and processor.
"""

from importlib import resources

from ml_collections import ConfigDict


def get_config(folder: str = ".cache/smollm2-135m") -> ConfigDict:
    """Return the folders of both parts, and the training stages in order."""
    config = ConfigDict()
    config.seed = 0
    teacher = resources.files("vlmprune_jax") / "demo" / "teacher"
    config.joined = ConfigDict({"language": folder, "tower": str(teacher)})
    common = {
        "augment": "flip_shift",
        "words": 0,
        "decoder_layers": 1000,  # all layers
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
    # The decoder learns in minutes to compare a question's word with a description such as "red circle", if no question
    # is answered by its wording. It does not learn so from images, from several questions per row (whose words are in
    # the row as well), or with negations from the start (decision 89).
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
    # then all questions, with as many words as an image has tokens
    words = {**compare, "name": "words", "records": "train", "words": 16, "steps": 80}
    # Tower and projector learn features that the decoder reads like words. Words in every other row keep the decoder
    # from forgetting how to compare before the features are useful.
    see = {**words, "name": "see", "also_images": True, "augment": "flip_shift", "trainable": "all", "steps": 150}
    see |= {"learning_rate": 2e-4}
    questions = {**see, "name": "questions", "words": 0, "also_images": False, "steps": 120}
    # answers of one word made it forget English (perplexity 4,116 on text, 15 before), so half of the rows are English
    english = {**questions, "name": "english", "text_share": 0.5, "steps": 80, "projector_learning_rate": 2e-4}
    # the step at which comparing is learnt is random, and depends on the processor's rounding (decision 89)
    learnt = {"until_loss": 0.05, "runs": 5}
    stages = (align, captions, {**compare, **learnt}, {**words, **learnt}, see, questions, english)
    config.stages = tuple(ConfigDict(stage) for stage in stages)
    return config
