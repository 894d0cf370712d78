"""diffusers as a contender of `mc-bench`: a process of its own, for the runtime has no torch.

Neighbours: `policies.take_turns` runs it beside the policies; the process is
`mc_export.diffusers_baseline`, whose `serve` describes what is said.
"""

__all__ = ["DiffusersProcess"]

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mc_engines.errors import EngineError, MissingExtraError, not_installed
from mc_runtime.bench.policies import Contender, Frames, Latents, Turn
from mc_runtime.options import GenerationOptions

MODULE = "mc_export.diffusers_baseline"
_ONLY = {"sigma_table": "diffusers", "first_sample": "aliased"}  # what diffusers can do


class DiffusersProcess:
    """diffusers on the same weights, noise and embeddings, in a process that has torch.

    Args:
        checkpoint: Folder of the checkpoint that the bundle was exported from.
        folder: An empty one for the arrays that are passed.
        options: Of every generation.
        threads: Of torch; None leaves it to torch.

    Attributes:
        versions: Of diffusers and what it runs on.

    Raises:
        ValueError: diffusers has nothing like one of the options.
        MissingExtraError: torch is not installed.
        EngineError: It cannot start; the message says why.
    """

    def __init__(
        self, checkpoint: Path, folder: Path, options: GenerationOptions, threads: int | None
    ) -> None:
        for name, value in _ONLY.items():
            if getattr(options, name) != value:
                raise ValueError(
                    f"{name}: expected {value} beside the baseline diffusers, "
                    f"got {getattr(options, name)}. Leave one of them out."
                )
        if find_spec("torch") is None:  # looked for, not imported: it is for the process alone
            raise MissingExtraError(not_installed("torch", "export"))
        self._folder, self._options = folder, asdict(options)
        self._log = (folder / "log.txt").open("w")
        command = [sys.executable, "-m", MODULE, str(checkpoint)]
        if threads is not None:
            command += ["--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.versions: dict[str, str] = {}

    def __enter__(self) -> "DiffusersProcess":
        try:
            self.versions = self._receive()["versions"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def contender(self, noise: Latents, embeddings: Sequence[Mapping[str, Any]]) -> Contender:
        """Make a contender of the process."""
        for prompt, arrays in enumerate(embeddings):
            np.savez(self._folder / f"inputs{prompt}.npz", latents=noise, **arrays)

        def run(prompt: int, rows: int | None) -> Turn:
            output = self._output(prompt)
            wanted = rows is None and not output.exists()
            seconds = self._ask(
                inputs=str(self._folder / f"inputs{prompt}.npz"),
                options=self._options,
                rows=rows,
                output=str(output) if wanted else None,
            )["seconds"]
            return Turn(prompt, 0, seconds, [self._load(prompt, "latents")] if wanted else ())

        return run

    def frames(self, prompt: int) -> Frames | None:
        """The frames (n, height, width, 3) of a prompt; None if the checkpoint has no VAE."""
        frames: Frames | None = self._load(prompt, "frames")
        return frames

    def _output(self, prompt: int) -> Path:
        return self._folder / f"output{prompt}.npz"

    def _load(self, prompt: int, name: str) -> Any:
        with np.load(self._output(prompt)) as stored:
            return stored.get(name)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None  # a pipe, see above
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; what it said last is read next
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # a pipe, see above
        line = self._process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {}
        if "error" in reply:
            raise EngineError(reply["error"])
        if not reply:
            said = (self._folder / "log.txt").read_text().strip().splitlines()
            raise EngineError(
                f"diffusers: expected an answer from its process, got: "
                f"{said[-1] if said else 'nothing'}. Check the checkpoint."
            )
        return reply
