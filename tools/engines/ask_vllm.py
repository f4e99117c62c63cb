"""Ask vLLM's server questions that vlmprune has answered, and count the answers that are the same.

  python -m vllm.entrypoints.openai.api_server --model runs/demo/export-huggingface --dtype float32
  python tools/engines/ask_vllm.py runs/demo/data/test.json runs/demo/eval/NAME.answers.jsonl

The questions are records in LLaVA's format with one image and one question; the images are in `images` beside the file.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def request(url: str, body: Any = None) -> Any:
    """Send JSON to the server (or nothing), and return the JSON that it answers."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=600) as answer:
        return json.load(answer)


def ask(url: str, model: str, record: dict[str, Any], images: Path, tokens: int) -> str:
    """Return the greedy answer of at most `tokens` tokens to a record's question."""
    image = base64.b64encode((images / record["image"]).read_bytes()).decode()
    question = record["conversations"][0]["value"].replace("<image>", "").strip()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": question},
    ]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
    # Chat templates of LLaVA-1.5 leave the begin token to the processor, which vLLM calls without special tokens.
    completion = request(f"{url}/chat/completions", {**body, "add_special_tokens": True})
    return (completion["choices"][0]["message"]["content"] or "").strip()


def main() -> None:
    """Print how many answers are the same, and up to ten that differ; exit with code 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="JSON file of records")
    parser.add_argument("answers", type=Path, help="answers file of `vlmprune evaluate`, eval/*.answers.jsonl")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="address of the server")
    parser.add_argument("--max_tokens", type=int, default=4, help="evaluate.max_new_tokens of the answers")
    flags = parser.parse_args()
    records = {record["id"]: record for record in json.loads(flags.questions.read_text())}
    ours = [json.loads(line) for line in flags.answers.read_text().splitlines()]
    try:
        model, images = request(f"{flags.url}/models")["data"][0]["id"], flags.questions.parent / "images"
        with ThreadPoolExecutor(32) as threads:
            theirs = [
                *threads.map(lambda line: ask(flags.url, model, records[line["id"]], images, flags.max_tokens), ours)
            ]
    except OSError as error:  # HTTP errors among them
        sys.exit(f"{flags.url}: no answer ({error}): start the server, or read its log")
    differing = [pair for pair in zip(ours, theirs, strict=True) if pair[0]["prediction"] != pair[1]]
    for line, answer in differing[:10]:
        print(f"{line['id']}: vlmprune {line['prediction']!r}, vLLM {answer!r}")
    print(f"{len(ours) - len(differing):,} of {len(ours):,} answers are the same")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
