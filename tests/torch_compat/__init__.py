"""Stock transformers on torch, in a process of its own, for two versions of transformers.

Torch and JAX fight over threads inside one process, and two versions of transformers cannot share one at all. Importing
them takes about ten seconds of a core, so a test session has one process per version, which all its workers ask.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VERSIONS = ("5", "4.57")
SERVE = Path(__file__).parent / "serve.py"


class TorchJobError(Exception):
    """A folder that stock transformers does not load exactly, or a forward pass that failed."""


class TorchServers:
    """The processes, one per transformers version; each imports torch when it is first asked.

    `root` is the checkout: its .compat/transformers-4.57 (made by the Makefile) holds the second version. "5" is the
    version of the running Python. Sockets and logs lie in `folder`. The processes end with `close` or with the process
    that made this object, however that ends: they read its end of a pipe.
    """

    def __init__(self, root: Path, folder: Path):
        self._processes = []
        compat = root / ".compat" / "transformers-4.57"
        for version in VERSIONS:
            # Code that comes with a folder is imported from a copy, which would otherwise stay in the user's cache.
            environment = {**os.environ, "HF_MODULES_CACHE": str(folder / f"modules-{version}")}
            if version == "4.57":
                if not compat.is_dir():
                    continue  # said to those who ask for it
                environment["PYTHONPATH"] = str(compat)
            with socket.socket(socket.AF_UNIX) as listener, (folder / f"{version}.log").open("w") as log:
                listener.bind(str(folder / version))
                listener.listen()
                command = [sys.executable, str(SERVE), str(listener.fileno())]
                options = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "env": environment}
                self._processes.append(subprocess.Popen(command, pass_fds=[listener.fileno()], **options))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()  # it holds nothing; a tidy exit of torch takes seconds
            process.communicate()


class TorchOutputs:
    """Loads Hugging Face folders in stock transformers and returns what torch computes, as numpy.

    `folder` is that of the `TorchServers`, which may belong to another process.
    """

    def __init__(self, folder: Path):
        self._folder = folder
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
        "logits" and "nll" (negative log likelihood of each next input id, in nats), or is ("gradients",) alone: of the
        mean cross-entropy over `labels`, by name of the parameter. `max_new_tokens` adds "tokens",
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
        """Remove the files of all jobs."""
        self._scratch.cleanup()

    def _ask(self, version: str, line: str) -> dict:
        address = self._folder / version
        if not address.exists():
            raise TorchJobError(f".compat/transformers-{version} is missing: run `make setup-test`")
        with contextlib.suppress(ConnectionError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(address))
            with connection.makefile("rw") as lines:
                lines.write(line + "\n")
                lines.flush()
                if answer := lines.readline():
                    return json.loads(answer)
        log = (self._folder / f"{version}.log").read_text()
        raise TorchJobError(f"the transformers {version} process ended:\n{log[-3000:]}")
