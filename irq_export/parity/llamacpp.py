"""Log-probabilities of a GGUF as unmodified llama.cpp computes them.

The wheel `xllamacpp` carries stock llama.cpp and its server. The server runs in a child process and
answers on loopback (:mod:`irq_export.parity.llamacpp_process`); asking it for the `n_probs` = vocabulary
size most probable tokens gives the whole distribution. A sequence is fed prefix by prefix: the prompt
cache makes every position one decode step, so what is measured is the path that generation takes. The
numbers are log(softmax(logits)) of the raw logits, before any sampler, in float32; JSON carries them
without loss.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from irq_export.parity.llamacpp_process import Request, ServerProcess
from irq_formats.errors import IrqError, UnsupportedModel, UsageError

__all__ = ["LOGPROB_FLOOR", "LlamaCpp"]

LOGPROB_FLOOR = float(np.log(np.finfo(np.float32).smallest_subnormal))
"""Least log-probability that a float32 probability can express; smaller ones come back as this."""

_FORCE = 1e6  # logit bias: the sampler takes this token; the reported probabilities know no bias


class LlamaCpp:
    """A model, and at most one LoRA adapter, loaded into stock llama.cpp.

    Evaluation is float32 wherever the file's types allow it: float32 KV cache, no flash attention, no
    repacked weights. Use it as a context manager or call :meth:`close`.

    Args:
        model_path: A GGUF of an architecture that llama.cpp knows.
        lora_path: A LoRA adapter GGUF for it.
        lora_scale: The user's scale of the adapter; 0 switches it off.
        threads: Compute threads.
        ctx: Longest sequence, in tokens.
        timeout: Seconds to wait for one answer.
        verbose: Let llama.cpp's log through to stderr.

    Attributes:
        n_vocab: Size of the vocabulary.
        ctx: Longest sequence, in tokens.

    Raises:
        UsageError: A path does not exist, or threads or ctx is not positive.
        UnsupportedModel: xllamacpp is not installed, or llama.cpp refuses the model or adapter.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        lora_path: str | os.PathLike[str] | None = None,
        lora_scale: float = 1.0,
        threads: int = 2,
        ctx: int = 2048,
        *,
        timeout: float = 600.0,
        verbose: bool = False,
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise UnsupportedModel(
                "the llama.cpp runtime needs the package xllamacpp",
                hint="pip install irq-export[llamacpp]",
            )
        for path in (model_path, lora_path):
            if path is not None and not Path(path).is_file():
                raise UsageError("no such file", where=path)
        if threads < 1 or ctx < 1:
            raise UsageError("threads and ctx must be positive", got=f"{threads} and {ctx}")
        self.ctx = ctx
        settings = {
            "model": str(model_path),
            "lora": None if lora_path is None else str(lora_path),
            "lora_scale": lora_scale,
            "threads": threads,
            "ctx": ctx + 1,  # the server keeps room for the token it predicts
        }
        self._server = ServerProcess(settings, timeout=timeout, verbose=verbose)
        try:
            models = self._server.ask(Request("GET", "/v1/models"))
            self.n_vocab: int = models["data"][0]["meta"]["n_vocab"]
            self._letter = self.tokenize("a", add_special=False)[-1]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process; harmless when repeated."""
        self._server.close()

    @property
    def description(self) -> str:
        """Version and instruction sets, for reports."""
        return f"llama.cpp in xllamacpp {self._server.version}, {self._server.features}"

    def tokenize(self, text: str, add_special: bool = True, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: Any text.
            add_special: Add BOS or EOS if the file's flags say so.
            parse_special: Read the names of control tokens in the text as those tokens.
        """
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        answer = self._server.ask(Request("POST", "/tokenize", request))
        return [int(token) for token in answer["tokens"]]

    def logprobs(
        self, tokens: Sequence[int], *, progress: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        """Natural log-probabilities of every next token after every prefix.

        Row i is normalised in float64, which takes the rounding of llama.cpp's float32 sum over the
        vocabulary out again. About 0.2 s a position for a vocabulary of 49152, nearly all of it JSON.

        Args:
            tokens: (n,) token ids, used as they are: no BOS is added.
            progress: Called with the number of positions done.

        Returns:
            (n, n_vocab) float32; row i is the distribution after tokens[: i + 1].

        Raises:
            UsageError: No tokens, more than `ctx`, or ids outside of the vocabulary.
            IrqError: llama.cpp failed or died.
        """
        prompt = self._check(tokens)
        requests = (self._whole_distribution(prompt[: i + 1]) for i in range(len(prompt)))
        rows = np.empty((len(prompt), self.n_vocab), dtype=np.float32)
        for i, answer in enumerate(self._server.ask_all(requests)):
            rows[i] = _distribution(answer, self.n_vocab)
            if progress is not None:
                progress(i + 1)
        return rows

    def next_token_logprobs(
        self, tokens: Sequence[int], *, first: int = 1, progress: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float64]:
        """Natural log-probability of each token from ``first`` on, given those before it.

        The negative mean is the log-perplexity. Costs little more than a decode step a position: the
        sampler is forced to the wanted token, whose probability under the raw logits the server
        reports. llama.cpp sums the softmax in float32, which loses the far tail: for a vocabulary of
        49152 the values come out up to 1e-3 too high (measured: 3e-4).

        Args:
            tokens: (n,) token ids.
            first: Position of the first token that is scored, at least 1.
            progress: Called with the number of positions done.

        Returns:
            (n - first,) float64.

        Raises:
            UsageError, IrqError: As :meth:`logprobs`.
        """
        prompt = self._check(tokens)
        if first < 1:
            raise UsageError("nothing precedes the first token", expected="first >= 1", got=first)
        requests = (_completion(prompt[:i], forced=prompt[i], n_probs=1) for i in range(first, len(prompt)))
        values = np.empty(max(0, len(prompt) - first), dtype=np.float64)
        for i, answer in enumerate(self._server.ask_all(requests)):
            scored = answer.get("completion_probabilities")
            if scored:
                values[i] = max(float(scored[0]["logprob"]), LOGPROB_FLOOR)
            else:  # the token ends inside of a UTF-8 character: the server holds it back
                answer = self._server.ask(self._whole_distribution(prompt[: first + i]))
                values[i] = _distribution(answer, self.n_vocab)[prompt[first + i]]
            if progress is not None:
                progress(i + 1)
        return values

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """Up to `n` most probable tokens in a row; an end-of-generation token is the last one.

        Args:
            tokens: (m,) token ids of the prompt, m + n <= ctx.
            n: How many tokens to generate.

        Raises:
            UsageError, IrqError: As :meth:`logprobs`.
        """
        prompt = self._check(tokens, room=n)
        answer = self._server.ask(_completion(prompt, n_predict=n))
        return [int(token) for token in answer["tokens"]]

    def _whole_distribution(self, prompt: list[int]) -> Request:
        """Ask for all tokens; what is sampled does not matter, but must be whole UTF-8 to come back."""
        return _completion(prompt, forced=self._letter, n_probs=self.n_vocab)

    def _check(self, tokens: Sequence[int], room: int = 0) -> list[int]:
        prompt = [int(token) for token in tokens]
        if not prompt:
            raise UsageError("no tokens to evaluate")
        if len(prompt) + room > self.ctx:
            raise UsageError(
                "the sequence is longer than the context",
                expected=f"at most {self.ctx} tokens",
                got=len(prompt) + room,
                hint="pass a larger ctx",
            )
        if min(prompt) < 0 or max(prompt) >= self.n_vocab:
            raise UsageError(
                "token ids outside of the vocabulary",
                expected=f"0 <= id < {self.n_vocab}",
                got=f"{min(prompt)} to {max(prompt)}",
            )
        return prompt


def _completion(
    prompt: list[int], *, forced: int | None = None, n_predict: int = 1, n_probs: int = 0
) -> Request:
    """A request with neutral samplers: the most probable token, or the forced one, no penalties."""
    bias = [] if forced is None else [[forced, _FORCE]]
    content = {
        "prompt": prompt,
        "n_predict": n_predict,
        "n_probs": n_probs,
        "logit_bias": bias,
        "samplers": ["temperature"],
        "temperature": 0.0,
        "cache_prompt": True,
        "return_tokens": True,
    }
    return Request("POST", "/completion", content)


def _distribution(answer: dict[str, Any], n_vocab: int) -> npt.NDArray[np.float64]:
    """(n_vocab,) log-probabilities in the order of the ids, renormalised in float64; NaN stays NaN."""
    entries = answer["completion_probabilities"][0]["top_logprobs"]
    ids = np.fromiter((entry["id"] for entry in entries), np.int64, count=len(entries))
    if np.unique(ids).size != n_vocab:
        raise IrqError(
            "llama.cpp did not give the whole distribution",
            expected=f"{n_vocab} log-probabilities",
            got=f"those of {np.unique(ids).size} tokens",
        )
    row = np.empty(n_vocab)
    row[ids] = np.fromiter((entry["logprob"] for entry in entries), np.float64, count=len(entries))
    row = np.maximum(row, LOGPROB_FLOOR)
    normalised: npt.NDArray[np.float64] = row - np.log(np.exp(row).sum())
    return normalised
