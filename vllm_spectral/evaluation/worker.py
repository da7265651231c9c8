"""One engine in a process of its own, asked over a pipe: an engine cannot be taken down completely inside a process."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_spectral.config import Mode, SpectralConfig
from vllm_spectral.errors import SpectralError
from vllm_spectral.evaluation.candidates import Candidate, Engine
from vllm_spectral.evaluation.cases import Case
from vllm_spectral.evaluation.results import Metrics
from vllm_spectral.models.description import ModelDescription

PRELOAD = "vllm_spectral.evaluation.preload"
"""What the process has imported that all engines of a run are forked from."""
_LOG_TAIL = 3000


@dataclass(frozen=True)
class EngineRequest:
    """What to start.

    Attributes:
        model: the model.
        engine: kind of engine.
        config: configuration of a profile's engine.
        longest: tokens of the longest request.
        log: where the engine's own output goes; None for standard error.
    """

    model: ModelDescription
    engine: Engine
    config: SpectralConfig | None
    longest: int
    log: Path | None = None


class RemoteEngine:
    """The parent's end; every method waits for the child's answer.

    Raises:
        SpectralError: from any method, if the engine fails.
    """

    def __init__(self, pipe: Connection, alive: Callable[[], bool], log: Path | None) -> None:
        self._pipe = pipe
        self._alive = alive
        self._log = log

    def start(self) -> None:
        """Wait until the model is loaded."""
        self._call("start")

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        """Greedy continuations by stock attention."""
        answer: list[list[int]] = self._call("generate", list(prompts), max_tokens)
        return answer

    def record(self, ids: list[int], file: Path) -> None:
        """Write the exact cache's final hidden states of a request to a file."""
        self._call("record", ids, str(file))

    def score(self, candidate: Candidate, case: Case, reference: Path) -> Metrics:
        """Compare a candidate with the recorded reference; see :func:`compare_logits`."""
        answer: Metrics = self._call("score", candidate, case, str(reference))
        return answer

    def _call(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        while not self._pipe.poll(1.0):
            if not self._alive():
                raise SpectralError(f"the engine's process died{self._last_words()}")
        status, value = self._pipe.recv()
        if status != "ok":
            raise SpectralError(f"the engine failed: {value}{self._last_words()}")
        return value

    def _last_words(self) -> str:
        if self._log is None or not self._log.exists():
            return ""
        return "; the end of its log:\n" + self._log.read_text(errors="replace")[-_LOG_TAIL:]


@contextmanager
def engine(request: EngineRequest) -> Iterator[RemoteEngine]:
    """Start an engine, and kill it at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(request, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        remote = RemoteEngine(ours, process.is_alive, request.log)
        remote.start()
        yield remote
    finally:
        process.kill()
        process.join()


def _serve(request: EngineRequest, pipe: Connection) -> None:
    """The child: answer calls until killed."""
    from vllm_spectral.backend.orphan import end_with_parent

    if request.log is not None:
        os.dup2(os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    # Standard output belongs to the parent's result.
    os.dup2(2, 1)
    # A command that is killed takes its engine with it, whatever that is doing.
    end_with_parent()
    local: _LocalEngine | None = None
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            if local is None:
                local = _LocalEngine(request)
            pipe.send(("ok", getattr(local, method)(*args)))
        except Exception as error:
            traceback.print_exc()
            pipe.send(("error", str(error) if isinstance(error, SpectralError) else repr(error)))


class _LocalEngine:
    def __init__(self, request: EngineRequest) -> None:
        from vllm_spectral.backend.engine import OfflineEngine

        config = request.config
        if request.engine == "dense":
            config = SpectralConfig(mode=Mode.COMPARE)
        self._engine = OfflineEngine(
            request.model,
            config,
            max_model_len=request.longest + 1,
            max_num_seqs=8,
            kv_cache_tokens=2 * request.longest + 2048,
            kv_cache_dtype="fp8" if request.engine == "fp8" else "auto",
        )
        self._dense = request.engine == "dense"

    def start(self) -> None:
        """Nothing: to have been constructed is all."""

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        return self._engine.run(prompts, max_tokens=max_tokens)

    def record(self, ids: list[int], file: str) -> None:
        from vllm_spectral.backend.dense import Attend

        self._run(ids, Attend(), file)

    def score(self, candidate: Candidate, case: Case, reference: str) -> Metrics:
        from vllm_spectral.backend.dense import Attend

        rival = candidate.rival
        self._run(case.ids, Attend(rival, candidate.first, candidate.recent) if rival else None, None)
        (metrics,) = self._engine.rpc("spectral_compare", reference, case.ids, list(case.spans))
        return dict(metrics)

    def _run(self, ids: list[int], attend: Any, file: str | None) -> None:
        if self._dense:
            self._engine.rpc("spectral_attend", attend)
        self._engine.rpc("spectral_record", file)
        self._engine.run([ids])
        if self._dense:
            self._engine.rpc("spectral_attend", None)
