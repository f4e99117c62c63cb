"""Answer jobs, each a line of JSON, with what stock transformers and torch compute; one JSON line each.

A job: {"folder": HF folder, "class": name in transformers, "inputs": npz path, "output": npz path to write,
"want": subset of ["logits", "nll"] or ["gradients"], "max_new_tokens": int or null, "adapter": peft folder or null,
"dtype": "float32" or "float64", "trust_remote_code": bool, "save_to": a folder for save_pretrained, or null}. Or a
chat: {"folder", "output", "chat": messages, "max_new_tokens", "trust_remote_code"}: what the processor makes of it and,
with max_new_tokens, the answer of an image-text-to-text pipeline as "text". Or code: {"folder", "code": Python that
makes a `model` in that folder, "inputs", "output"}: its float32 logits. Answers: {"error": str or null,
"transformers": version}.
By hand: echo '{"folder": ...}' | PYTHONPATH=.compat/transformers-4.57 python tests/torch_compat/run.py
"""

import contextlib
import inspect
import json
import sys
import traceback
import warnings

import numpy as np
import torch
import transformers


def load_exactly(folder: str, class_name: str, dtype: torch.dtype, trust_remote_code: bool) -> torch.nn.Module:
    """The model of `folder` with eager attention; every tensor must fit the class and fill it."""
    model, report = getattr(transformers, class_name).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # not to accept them: so that they are in the report, by name
    )
    wrong = {kind: sorted(map(str, found)) for kind, found in report.items() if found}
    if wrong:
        raise ValueError(f"loaded with {wrong}")
    return model.eval()


def with_adapter(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """The model with a peft adapter on it; its tensors and the places for them must be the same."""
    import peft
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing keys
        adapted = peft.PeftModel.from_pretrained(model, folder).to(model.dtype)
    saved, loaded = load_file(f"{folder}/adapter_model.safetensors"), peft.get_peft_model_state_dict(adapted)
    wrong = [name for name in saved if name not in loaded or not torch.equal(saved[name], loaded[name].float())]
    if wrong or saved.keys() != loaded.keys():
        raise ValueError(f"adapter: {wrong}, {sorted(saved.keys() ^ loaded.keys())} not loaded as written")
    return adapted.eval()


def next_token_nll(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """float64[batch, seq - 1]: -log p(input_ids[:, t + 1] | input_ids[:, :t + 1]); one row at a time to save memory.

    In float64, because torch's float32 sum over 49,152 words of SmolLM2 is 9e-6 too small on average.
    """
    rows = zip(logits[:, :-1], input_ids[:, 1:], strict=True)
    return torch.stack([torch.nn.functional.cross_entropy(row.double(), ids, reduction="none") for row, ids in rows])


def read_inputs(path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The arrays of an npz file in the model's dtype, integers as int64."""
    with np.load(path) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return {name: tensor.to(dtype if tensor.is_floating_point() else torch.long) for name, tensor in tensors.items()}


@torch.enable_grad()
def gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{parameter: gradient} of the mean cross-entropy over all `labels`; parameters without one are left out."""
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@torch.no_grad()
def run_job(job: dict) -> None:
    """Load, compute what the job wants, write it."""
    dtype = getattr(torch, job["dtype"])
    model = load_exactly(job["folder"], job["class"], dtype, job["trust_remote_code"])
    if job["save_to"]:
        model.save_pretrained(job["save_to"])
    if job["adapter"]:
        model = with_adapter(model, job["adapter"])
    inputs, takes = read_inputs(job["inputs"], dtype), inspect.signature(model.forward).parameters
    if "mm_token_type_ids" not in takes:  # version 4 finds images by their ids
        inputs.pop("mm_token_type_ids", None)
    outputs = {}
    if "gradients" in job["want"]:
        outputs = gradients(model, inputs)
    elif job["want"]:
        logits = model(**inputs, use_cache=False).logits
        if "logits" in job["want"]:
            outputs["logits"] = logits
        if "nll" in job["want"]:
            outputs["nll"] = next_token_nll(logits, inputs["input_ids"])
    if job["max_new_tokens"]:
        # A fresh configuration: no eos to stop at, no sampling defaults and no length limits of the folder's own.
        greedy = transformers.GenerationConfig(max_new_tokens=job["max_new_tokens"], do_sample=False, pad_token_id=0)
        model.generation_config = greedy
        tokens = model.generate(**inputs, generation_config=greedy, use_cache=True)
        outputs["tokens"] = tokens[:, inputs["input_ids"].shape[1] :]
    np.savez(job["output"], **{name: tensor.numpy() for name, tensor in outputs.items()})


@torch.no_grad()
def run_chat(job: dict) -> str:
    """Write what the folder's processor makes of a chat; return what the pipeline answers to it, greedily."""
    processor = transformers.AutoProcessor.from_pretrained(job["folder"])
    made = processor.apply_chat_template(
        job["chat"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    np.savez(job["output"], **{name: tensor.numpy() for name, tensor in made.items()})
    if not job["max_new_tokens"]:
        return ""
    pipeline = transformers.pipeline(
        "image-text-to-text", model=job["folder"], dtype=torch.float32, trust_remote_code=job["trust_remote_code"]
    )
    answer = pipeline(text=job["chat"], max_new_tokens=job["max_new_tokens"], do_sample=False, return_full_text=False)
    return answer[0]["generated_text"]


@torch.no_grad()
def run_code(job: dict) -> None:
    """Run what a folder's card says, in that folder, and write the logits of the model it makes."""
    made: dict = {}
    with contextlib.chdir(job["folder"]):
        exec(job["code"], made)
    model = made["model"].float().eval()
    np.savez(job["output"], logits=model(**read_inputs(job["inputs"], torch.float32), use_cache=False).logits.numpy())


def answer(line: str) -> str:
    """What became of the job, without its newline."""
    found = {"error": None, "transformers": transformers.__version__}
    try:
        job = json.loads(line)
        if "chat" in job:
            found["text"] = run_chat(job)
        elif "code" in job:
            run_code(job)
        else:
            run_job(job)
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    return json.dumps(found)


if __name__ == "__main__":
    for job_line in sys.stdin:
        print(answer(job_line), flush=True)
