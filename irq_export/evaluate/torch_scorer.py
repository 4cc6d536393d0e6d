"""Log-likelihoods from a transformers model, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from irq_export.evaluate.questions import Request
from irq_export.evaluate.scorers import Progress, Score
from irq_export.hf_directory import check_tokens

__all__ = ["TorchScorer"]


class TorchScorer:
    """A causal language model of transformers, with or without an adapter.

    The model is asked for logits over the end of a batch only, and as it is: put it in evaluation mode.

    Args:
        model: Takes ``input_ids`` and ``logits_to_keep``, returns ``logits``.
        max_length: Tokens a sequence may hold; default: the model's own.
        batch_tokens: Tokens of a batch, padding included; a longer sequence is a batch of its own.
    """

    def __init__(self, model: nn.Module, *, max_length: int | None = None, batch_tokens: int = 4096) -> None:
        config: Any = model.config
        parameter = next(model.parameters())
        self._device = parameter.device
        self.name = f"torch {str(parameter.dtype).removeprefix('torch.')}"
        self.max_length: int = max_length or config.max_position_embeddings
        self._model, self._batch_tokens = model, batch_tokens

    @torch.no_grad()
    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """Return one score a request.

        Raises:
            MalformedFile: A token that the model does not have.
        """
        fitted = [request.fitted(self.max_length) for request in requests]
        check_tokens(max((max(r.context + r.continuation) for r in fitted), default=0), self._model)
        owners: dict[tuple[int, ...], list[int]] = {}  # tokens to read -> requests answered by them
        for i, request in enumerate(fitted):
            owners.setdefault(request.context + request.continuation[:-1], []).append(i)
        scores: dict[int, Score] = {}
        for batch in self._batches(owners):
            indices = [i for tokens in batch for i in owners[tokens]]
            rows = [row for row, tokens in enumerate(batch) for _ in owners[tokens]]
            found = self._score_batch(batch, rows, [fitted[i].continuation for i in indices])
            scores.update(zip(indices, found, strict=True))
            if progress is not None:
                progress(len(scores))
        return [scores[i] for i in range(len(requests))]

    def _batches(self, sequences: dict[tuple[int, ...], list[int]]) -> Iterator[list[tuple[int, ...]]]:
        """Cut sequences, longest first, so that too little memory shows at once."""
        batch: list[tuple[int, ...]] = []
        for tokens in sorted(sequences, key=len, reverse=True):
            if batch and (len(batch) + 1) * len(batch[0]) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(tokens)
        if batch:
            yield batch

    def _score_batch(
        self, batch: list[tuple[int, ...]], rows: list[int], continuations: list[tuple[int, ...]]
    ) -> list[Score]:
        """Score continuations; number i follows (overlaps the end of) sequence ``rows[i]`` of the batch."""
        width = max(map(len, batch))
        ids = torch.tensor([(*tokens, *[0] * (width - len(tokens))) for tokens in batch], device=self._device)
        first = [len(batch[row]) - len(c) for row, c in zip(rows, continuations, strict=True)]
        kept = width - min(first)
        # pads stand behind what is read: a causal model needs no mask
        logits: Tensor = self._model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
        targets = self._tensor([token for c in continuations for token in c])
        owner = self._tensor([i for i, c in enumerate(continuations) for _ in c])
        position = self._tensor(
            [f + j for f, c in zip(first, continuations, strict=True) for j in range(len(c))]
        )
        chosen = logits[self._tensor(rows)[owner], position - (width - kept)]  # (tokens, vocab)
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        logprobs = chosen.log_softmax(-1).gather(1, targets[:, None])[:, 0].double()
        totals = torch.zeros(len(continuations), dtype=torch.float64, device=self._device)
        misses = torch.zeros_like(totals).index_add_(0, owner, (chosen.argmax(-1) != targets).double())
        totals.index_add_(0, owner, logprobs)
        pairs = zip(totals.tolist(), misses.tolist(), strict=True)
        return [Score(total, missed == 0) for total, missed in pairs]

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)
