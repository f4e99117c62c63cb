"""Stock transformers on torch, in a process of its own, for two versions of transformers.

Torch and JAX fight over threads inside one process, and two versions of transformers cannot share one at all. Starting
such a process takes about ten seconds, so each version's process is started once and answers jobs until it is closed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

VERSIONS = ("5", "4.57")
RUNNER = Path(__file__).parent / "run.py"


class TorchJobError(Exception):
    """A folder that stock transformers does not load exactly, or a forward pass that failed."""


class TorchWorkers:
    """Processes that load Hugging Face folders in stock transformers and return what torch computes, as numpy.

    `root` is the checkout: its .compat/transformers-4.57 (made by the Makefile) holds the second version. "5" is the
    version of the running Python.
    """

    def __init__(self, root: Path):
        self._compat = root / ".compat" / "transformers-4.57"
        self._processes: dict[str, subprocess.Popen] = {}
        self._logs: dict[str, IO[str]] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="torch-outputs-")
        self._jobs = 0

    def __call__(
        self,
        folder: Path,
        inputs: dict[str, np.ndarray],
        *,
        class_name: str,
        version: str,
        want: tuple[str, ...] = ("logits",),
        max_new_tokens: int | None = None,
        adapter: Path | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        save_to: Path | None = None,
    ) -> dict[str, np.ndarray]:
        """Run one folder: {"logits": float32[batch, seq, vocab], "nll": float64[batch, seq - 1], "tokens": int64[...]}.

        `inputs` are int `input_ids` and optionally `attention_mask` and float `pixel_values`. `want` chooses among
        "logits" and "nll" (negative log likelihood of each next input id, in nats); `max_new_tokens` adds "tokens",
        int64[batch, max_new_tokens], decoded greedily with eos ignored. `adapter` is a peft folder to put on the model.
        Weights and arithmetic have `dtype`, attention is eager.
        `save_to` is a folder for save_pretrained. Code in the folder runs only with `trust_remote_code`.
        Raises TorchJobError if a key is missing, unexpected or mismatched, or if anything else fails.
        """
        source = Path(self._scratch.name) / "in.npz"
        np.savez(source, **inputs)
        job: dict = {"class": class_name, "inputs": str(source)}
        job |= {"want": list(want), "max_new_tokens": max_new_tokens}
        job |= {"adapter": adapter and str(adapter), "dtype": dtype}
        job |= {"trust_remote_code": trust_remote_code, "save_to": save_to and str(save_to)}
        return self._run(folder, job, version)[0]

    def code(self, folder: Path, code: str, inputs: dict[str, np.ndarray], *, version: str) -> np.ndarray:
        """float32[batch, seq, vocab] logits of the `model` that Python code makes where `folder` is the working one."""
        source = Path(self._scratch.name) / "in.npz"
        np.savez(source, **inputs)
        return self._run(folder, {"code": code, "inputs": str(source)}, version)[0]["logits"]

    def chat(
        self,
        folder: Path,
        messages: list[dict],
        *,
        version: str,
        max_new_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> tuple[dict[str, np.ndarray], str]:
        """What the folder's processor makes of a chat (input_ids, pixel_values, ...), and a pipeline's answer to it."""
        job = {"chat": messages, "max_new_tokens": max_new_tokens, "trust_remote_code": trust_remote_code}
        outputs, answer = self._run(folder, job, version)
        return outputs, answer["text"]

    def _run(self, folder: Path, job: dict, version: str) -> tuple[dict[str, np.ndarray], dict]:
        self._jobs += 1
        target = Path(self._scratch.name) / f"{self._jobs}-out.npz"
        answer = self._ask(version, json.dumps(job | {"folder": str(folder), "output": str(target)}))
        if answer["error"]:
            raise TorchJobError(f"{folder} in transformers {answer['transformers']}: {answer['error']}")
        if not answer["transformers"].startswith(version + "."):
            raise TorchJobError(f"asked for transformers {version}, ran in {answer['transformers']}")
        with np.load(target) as outputs:
            return dict(outputs), answer

    def close(self) -> None:
        """End the processes and remove their files."""
        for process in self._processes.values():
            process.kill()  # it holds nothing; a tidy exit of torch takes seconds
            process.communicate()
        for log in self._logs.values():
            log.close()
        self._scratch.cleanup()

    def _ask(self, version: str, line: str) -> dict:
        if version not in self._processes:
            self._start(version)
        process, log = self._processes[version], self._logs[version]
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            code = self._processes.pop(version).wait()
            log.seek(0)
            raise TorchJobError(f"the transformers {version} process ended (exit {code}):\n{log.read()[-3000:]}")
        return json.loads(answer)

    def _start(self, version: str) -> None:
        # Code that comes with a folder is imported from a copy, which would otherwise stay in the user's cache.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(self._scratch.name) / f"modules-{version}")}
        if version == "4.57":
            if not self._compat.is_dir():
                raise TorchJobError(f"{self._compat} is missing: run `make setup-test` in {self._compat.parents[1]}")
            environment["PYTHONPATH"] = str(self._compat)
        log = open(Path(self._scratch.name) / f"stderr-{version}.txt", "w+")  # noqa: SIM115 (closed in close())
        self._logs[version] = log
        command = [sys.executable, str(RUNNER)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True)
        self._processes[version] = process
