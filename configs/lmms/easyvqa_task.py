"""lmms-eval task functions for records in LLaVA's format with one question about one image."""

from pathlib import Path

from PIL import Image


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """Return the question of a record without its image placeholder."""
    return doc["conversations"][0]["value"].replace("<image>", "").strip()


def doc_to_target(doc):
    """Return the reference answer of a record."""
    return doc["conversations"][1]["value"]


def doc_to_messages(doc, lmms_eval_specific_kwargs):
    """Return one message: the image from the task's folder `images`, then the question."""
    with Image.open(Path(lmms_eval_specific_kwargs["images"]) / doc["image"]) as image:
        picture = image.convert("RGB")
    content = [{"type": "image", "url": picture}, {"type": "text", "text": doc_to_text(doc)}]
    return [{"role": "user", "content": content}]
