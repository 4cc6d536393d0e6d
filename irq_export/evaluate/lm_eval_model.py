"""Any of our scorers as a model of EleutherAI's lm-evaluation-harness (package ``lm_eval``, not required).

For tasks beyond our own::

    with open_model("model.gguf") as model:
        lm_eval.simple_evaluate(model=HarnessModel(model), tasks=["sciq"])
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance  # type: ignore[import-not-found, unused-ignore]
from lm_eval.api.model import LM  # type: ignore[import-not-found, unused-ignore]

from irq_export.evaluate.models import EvaluatedModel
from irq_export.evaluate.questions import Request, encode_pair
from irq_formats.errors import UnsupportedModel

__all__ = ["HarnessModel"]


class HarnessModel(LM):  # type: ignore[misc, unused-ignore]
    """Answers ``loglikelihood``; tasks that generate text or roll over documents are refused.

    Args:
        model: From :func:`irq_export.evaluate.models.open_model`.
    """

    def __init__(self, model: EvaluatedModel) -> None:
        super().__init__()
        self._model = model

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of the continuation of every (context, continuation)."""
        asked = [self._request(*instance.args) for instance in requests]
        return [(score.logprob, bool(score.greedy)) for score in self._model.scorer.score(asked)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse.

        Raises:
            UnsupportedModel: Always.
        """
        raise UnsupportedModel("perplexity tasks of lm_eval", hint="irq-export evaluate --tasks wikitext2")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refuse.

        Raises:
            UnsupportedModel: Always.
        """
        raise UnsupportedModel("generation tasks of lm_eval", hint="Serve the file: irq-export serve")

    def _request(self, context: str, continuation: str) -> Request:
        tokenizer = self._model.tokenizer

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special=False)

        if context.strip():  # else nothing stands before the continuation: its blanks belong to it
            return encode_pair(encode, context, continuation)
        start: Any = tokenizer.bos if tokenizer.bos is not None else (*tokenizer.stop_tokens, None)[0]
        if start is None:
            raise UnsupportedModel("an empty context needs a tokenizer with BOS")
        return Request((start,), tuple(encode(context + continuation)))
