"""How far apart two runtimes are, from their logits.

Logits of different runtimes may differ by a constant per position without meaning anything, and some
runtimes give only log-probabilities: everything here is computed on log-probabilities (log-softmax in
float64), for which that constant is fixed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LogitMetrics", "compare", "log_softmax"]

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class LogitMetrics:
    """Agreement of a candidate with a reference over all positions.

    Attributes:
        positions: Number of positions compared.
        nmse: Mean squared difference of log-probabilities over the reference's variance.
        max_abs: Largest absolute difference of a log-probability.
        kl_mean: Mean of KL(reference || candidate) per position, nats.
        kl_p999: Its 99.9th percentile, nats.
        top1: Share of positions with the same most likely token.
        top10: Mean share of common tokens among the ten most likely.
        perplexity_reference: exp of the mean negative log-likelihood of the text, reference.
        perplexity: The same, candidate.
    """

    positions: int
    nmse: float
    max_abs: float
    kl_mean: float
    kl_p999: float
    top1: float
    top10: float
    perplexity_reference: float
    perplexity: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields, for JSON."""
        return asdict(self)


def log_softmax(logits: NDArray[np.floating]) -> F64:
    """Return log-probabilities float64, over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@np.errstate(invalid="ignore", over="ignore")  # of logits that are not finite
def compare(
    reference: NDArray[np.floating], candidate: NDArray[np.floating], tokens: NDArray[np.integer]
) -> LogitMetrics:
    """Compare two runtimes on one text.

    Args:
        reference: Logits or log-probabilities ``(n, vocab)``, position i predicting token i + 1.
        candidate: The same, of the other runtime.
        tokens: The ``n`` tokens both were given.

    Returns:
        The metrics; perplexities are over the ``n - 1`` predicted tokens. Where logits are not finite, NMSE
        and KL are NaN or infinite, which no gate lets pass.
    """
    p, q = log_softmax(reference), log_softmax(candidate)
    difference = q - p
    kl = np.maximum(-(np.exp(p) * difference).sum(axis=1), 0.0)
    rows, following = np.arange(len(tokens) - 1), tokens[1:]
    k = min(10, p.shape[1])
    top_p, top_q = (np.argpartition(x, -k, axis=1)[:, -k:] for x in (p, q))
    common = [len(np.intersect1d(a, b)) / k for a, b in zip(top_p, top_q, strict=True)]
    return LogitMetrics(
        positions=len(tokens),
        nmse=float(np.mean(difference**2) / np.var(p)),
        max_abs=float(np.abs(difference).max()),
        kl_mean=float(kl.mean()),
        kl_p999=float(np.quantile(kl, 0.999)),
        top1=float(np.mean(p.argmax(axis=1) == q.argmax(axis=1))),
        top10=float(np.mean(common)),
        perplexity_reference=float(np.exp(-p[rows, following].mean())),
        perplexity=float(np.exp(-q[rows, following].mean())),
    )
