"""Continuous batching: one thread owns the engine and serves all texts in turns.

A turn admits waiting jobs to free slots, reads one chunk of the oldest unfinished prompt, and decodes one
token of every text whose prompt has been read, all in one pass over the weights. So a long prompt delays the
others by a chunk a token at most.

A text does not depend on its neighbours, to the bit: with at most eight texts the engine computes each row
of a pass with the same operations as alone (with more it sums in another order), and prompts are cut at
multiples of the chunk, whatever else is going on. A slot keeps what it has read: a prompt that begins like
an earlier one skips the whole chunks they share, which were computed by the same operations too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import IrqError
from irq_runtime.engine import Engine, EngineSession
from irq_runtime.serve.errors import QueueFull, Stopping
from irq_runtime.serve.generation import Event, Generation, Job
from irq_runtime.tokenizer import Tokenizer

__all__ = ["Load", "Scheduler"]

LOG = logging.getLogger("uvicorn.error")  # where the server's own messages go


@dataclass(frozen=True)
class Load:
    """How the scheduler does.

    Attributes:
        running: Texts being generated.
        waiting: Those that wait for a place.
        state: ``ok``, ``failed`` (the engine's last pass did: the file has changed, for one) or ``stopping``.
    """

    running: int
    waiting: int
    state: str


@dataclass
class _Slot:
    """A sequence of the engine, and the job that uses it.

    Attributes:
        session: The sequence.
        chunks: Tokens of the whole chunks at its beginning.
        job: None when free.
        since: Turn in which the last job came.
    """

    session: EngineSession
    chunks: list[int] = field(default_factory=list)
    job: Job | None = None
    since: int = 0


class Scheduler:
    """Runs generations on an engine.

    Args:
        engine: Used by this scheduler's thread alone from now on.
        tokenizer: Turns tokens to text.
        sequences: Texts decoded together.
        queue: Jobs that may wait.
        chunk: Prompt tokens read a turn.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, sequences: int = 4, queue: int = 64, chunk: int = 128
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._queue = queue
        self._chunk = chunk
        self._slots = [_Slot(engine.session()) for _ in range(sequences)]
        self._waiting: deque[Job] = deque()
        self._turn = 0
        self._wake = threading.Condition()  # guards _waiting, _slots[].job and _is_open
        self._is_open = True
        self._has_failed = False
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="irq-scheduler", daemon=True)
        self._thread.start()

    def submit(self, generations: Sequence[Generation], emit: Callable[[int, Event], None]) -> list[Job]:
        """Queue generations, all or none.

        Args:
            generations: What to generate.
            emit: Called from the scheduler's thread with the index of a generation and its next event.

        Raises:
            QueueFull: There is no room for all of them.
            Stopping: The scheduler takes no more.
        """
        with self._wake:
            if not self._is_open or self._deadline is not None:
                raise Stopping("the server is stopping")
            room = self._queue + len(self._free()) - len(self._waiting)
            if len(generations) > room:
                raise QueueFull(
                    "too many requests wait", expected=f"at most {self._queue}", hint="Try again later"
                )
            jobs = [
                Job(generation, self._tokenizer, partial(emit, index))
                for index, generation in enumerate(generations)
            ]
            self._waiting.extend(jobs)
            self._wake.notify()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs that nobody waits for any more; those that have ended are left alone."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def load(self) -> Load:
        """Return how busy the scheduler is."""
        with self._wake:
            running = len(self._slots) - len(self._free())
            is_open = self._is_open and self._deadline is None
            state = "stopping" if not is_open else "failed" if self._has_failed else "ok"
            return Load(running, len(self._waiting), state)

    def stop_after(self, seconds: float) -> None:
        """Take no more jobs and end those left in ``seconds``; without a lock, for signal handlers."""
        self._deadline = time.monotonic() + seconds

    def close(self) -> None:
        """End all jobs and the thread."""
        with self._wake:
            self._is_open = False
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                self._turn += 1
                self._read_prompt()
                self._decode()
        finally:  # also when a bug ends the thread: nobody may wait for ever
            with self._wake:
                self._is_open = False
                self._end_all()

    def _admit(self) -> bool:
        """Wait for work and fill the slots; return False when the scheduler is closed."""
        with self._wake:
            while self._is_open:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._end_all()
                self._drop_cancelled()
                while self._waiting and self._free():
                    self._seat(self._waiting.popleft())
                if self._busy():
                    return True
                self._wake.wait()
            return False

    def _free(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.job is None]

    def _busy(self) -> list[tuple[_Slot, Job]]:
        return [(slot, slot.job) for slot in self._slots if slot.job is not None]

    def _seat(self, job: Job) -> None:
        """Give a job the free slot that has read most of its prompt, or else was used least recently."""
        slot = max(self._free(), key=lambda slot: (self._shared(slot, job), -slot.since))
        shared = self._shared(slot, job)
        del slot.chunks[shared:]
        slot.session.cache.truncate(shared)
        slot.job, slot.since = job, self._turn
        with self._ending([(slot, job)]):
            job.begin(shared)

    def _shared(self, slot: _Slot, job: Job) -> int:
        """Return how many tokens of a prompt a slot has read; the last one is always read again."""
        if job.wants_all_logits:
            return 0
        most = min(len(slot.chunks), len(job.unread) - 1) // self._chunk * self._chunk
        while slot.chunks[:most] != job.unread[:most]:
            most -= self._chunk
        return most

    def _read_prompt(self) -> None:
        """Read one chunk of the oldest prompt; its last token is left to the decoding pass."""
        unread = [(slot, job) for slot, job in self._busy() if len(job.unread) > 1]
        if not unread:
            return
        slot, job = min(unread, key=lambda pair: pair[0].since)
        part = job.unread[: min(self._chunk, len(job.unread) - 1)]

        def read() -> NDArray[np.float32]:
            if job.wants_all_logits:
                return self._engine.step(part, slot.session.cache)
            return slot.session.next_logits(part)

        with self._ending([(slot, job)]):
            job.read(len(part), self._watched(read))
            if len(part) == self._chunk:
                slot.chunks += part

    def _decode(self) -> None:
        """Add one token to every text whose prompt has been read."""
        ready = [(slot, job) for slot, job in self._busy() if len(job.unread) == 1]
        if not ready:
            return
        with self._ending(ready):
            tokens = [job.unread[0] for _, job in ready]
            caches = [slot.session.cache for slot, _ in ready]
            logits = self._watched(lambda: self._engine.step_each(tokens, caches))
            for (slot, job), row in zip(ready, logits, strict=True):
                with self._ending([(slot, job)]):
                    reason = job.advance(row)
                    if reason is not None:
                        self._finish(slot, job, reason)

    def _watched(self, engine_pass: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Make a pass and return its logits; remember whether it failed."""
        try:
            logits = engine_pass()
        except Exception:
            self._has_failed = True
            raise
        self._has_failed = False
        return logits

    @contextmanager
    def _ending(self, jobs: Sequence[tuple[_Slot, Job]]) -> Iterator[None]:
        """End the jobs that an error befalls, and no others: the thread goes on."""
        try:
            yield
        except IrqError as error:  # the file has changed, or the model computes NaN
            failure = error
        except Exception:
            LOG.exception("a bug ended %d requests", len(jobs))
            failure = IrqError("internal error")
        else:
            return
        for slot, job in jobs:
            self._finish(slot, job, "error", failure)

    def _finish(self, slot: _Slot, job: Job, reason: str, error: IrqError | None = None) -> None:
        """Free a slot, then tell the client: its next request finds the slot free."""
        with self._wake:
            slot.job = None
        job.end(reason, error)

    def _drop_cancelled(self) -> None:
        for slot, job in self._busy():
            if job.cancelled:
                slot.job = None
                job.end("cancelled")
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            job.end("cancelled")

    def _end_all(self) -> None:
        error = Stopping("the server is stopping")
        for slot, job in self._busy():
            slot.job = None
            job.end("error", error)
        while self._waiting:
            self._waiting.popleft().end("error", error)
