"""What lmms-eval asks of a record in LLaVA's format: one question about one image, and the right answer."""

from pathlib import Path

from PIL import Image


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The question, without the mark of its image."""
    return doc["conversations"][0]["value"].replace("<image>", "").strip()


def doc_to_target(doc):
    """The answer."""
    return doc["conversations"][1]["value"]


def doc_to_messages(doc, lmms_eval_specific_kwargs):
    """One message: the image below the task's `images`, then the question."""
    with Image.open(Path(lmms_eval_specific_kwargs["images"]) / doc["image"]) as image:
        picture = image.convert("RGB")
    content = [{"type": "image", "url": picture}, {"type": "text", "text": doc_to_text(doc)}]
    return [{"role": "user", "content": content}]
