"""The generations of one request under way: from the scheduler's events to a reply."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence

from irq_formats.errors import IrqError
from irq_runtime.serve.errors import error_body
from irq_runtime.serve.generation import Delta, Done, Event, Generation
from irq_runtime.serve.logprobs import TokenLogprobs
from irq_runtime.serve.replies import Format, Json
from irq_runtime.serve.scheduler import Scheduler

__all__ = ["Flight"]


class Flight:
    """Submits generations and gathers what comes of them.

    Args:
        scheduler: Runs them.
        generations: ``copies`` of each prompt in turn.
        copies: How many.

    Raises:
        QueueFull: There is no room for them.
        Stopping: The server is stopping.
    """

    def __init__(self, scheduler: Scheduler, generations: Sequence[Generation], copies: int) -> None:
        self._scheduler = scheduler
        self._generations = generations
        self._copies = copies
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._events = events  # `emit` does not hold the flight: no cycle, freed at once
        loop = asyncio.get_running_loop()

        def emit(index: int, event: Event) -> None:  # on the scheduler's thread
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        self._jobs = scheduler.submit(generations, emit)

    def cancel(self) -> None:
        """End what has not ended."""
        self._scheduler.cancel(self._jobs)

    async def whole(self, form: Format) -> Json:
        """Wait for the end and return the reply.

        Raises:
            IrqError: A generation failed.
        """
        texts = [""] * len(self._generations)
        logprobs: list[list[TokenLogprobs]] = [[] for _ in texts]
        ends: dict[int, Done] = {}
        async for index, event in self._until_done():
            if isinstance(event, Done):
                ends[index] = event
                continue
            texts[index] += event.text
            logprobs[index] += event.logprobs
        choices = [
            form.choice(
                index,
                text,
                None if self._generations[index].logprobs is None else logprobs[index],
                ends[index].reason,
            )
            for index, text in enumerate(texts)
        ]
        return form.whole(choices, self._usage(ends))

    async def stream(self, form: Format, *, with_usage: bool) -> AsyncIterator[str]:
        """Yield the reply as server-sent events; a failure is the last but one of them."""
        usage: dict[str, Json | None] = {"usage": None} if with_usage else {}
        for index in range(len(self._generations)):
            opening = form.opening(index)
            if opening is not None:
                yield _sse(form.chunk([opening], **usage))
        ends: dict[int, Done] = {}
        try:
            async for index, event in self._until_done():
                if isinstance(event, Delta):
                    yield _sse(
                        form.chunk([form.delta(index, event.text, event.logprobs or None, None)], **usage)
                    )
                else:
                    ends[index] = event
                    yield _sse(form.chunk([form.delta(index, "", None, event.reason)], **usage))
            if with_usage:
                yield _sse(form.chunk([], usage=self._usage(ends)))
        except IrqError as error:
            yield _sse(error_body(error))
        yield "data: [DONE]\n\n"

    async def _until_done(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield events of all generations until the last has ended.

        Raises:
            IrqError: A generation failed.
        """
        left = len(self._generations)
        while left:
            index, event = await self._events.get()
            if isinstance(event, Done):
                left -= 1
                if event.error is not None:
                    raise event.error
            yield index, event
            await asyncio.sleep(0)  # queued events do not wait: let the loop see that a client has left

    def _usage(self, ends: Mapping[int, Done]) -> Json:
        """Return token counts; a prompt counts once, however many copies continue it."""
        first = range(0, len(self._generations), self._copies)
        prompt = sum(len(self._generations[index].prompt) for index in first)
        generated = sum(end.tokens for end in ends.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(ends[index].cached for index in first)},
        }


def _sse(document: Json) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"
