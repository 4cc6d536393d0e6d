"""An HTTP server that speaks OpenAI's protocol, over the native engine.

One thread owns the engine (:mod:`~irq_runtime.serve.scheduler`): it decodes all running texts together and
reads new prompts in between, a chunk at a time. The HTTP side (:mod:`~irq_runtime.serve.app`) only parses,
queues and formats. With up to eight texts at a time, what a request gets does not depend on the others.
Needs the extra ``serve`` (FastAPI and uvicorn); never torch.
"""

from __future__ import annotations

from irq_runtime.serve.options import ServeOptions

__all__ = ["ServeOptions"]
