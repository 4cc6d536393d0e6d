"""Numbers with standard errors, alone and in pairs.

A measure is a function of the mean of its samples. Its influence values, how much each sample moves the
result, are what standard errors are made of: ``sqrt(sum(influence^2) / (n (n - 1)))`` is the usual error of
a mean, the delta method for a perplexity, and a stratified one for a mean of subjects. Two models that
answered the same questions differ with the error of the *differences* of their influence values, which is
far smaller than that of either where they agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import UsageError

__all__ = ["Difference", "Measure", "difference"]

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measure:
    """One number about a model.

    Attributes:
        name: ``acc``, ``acc_norm``, ``acc_subjects`` or ``perplexity``.
        samples: float64 ``(n,)``: 0 or 1 per question, or nats per token of a window.
        groups: Group of each sample ``(n,)``; with it the value is the mean of the groups' means.
        exponential: Whether the value is exp of the mean.
    """

    name: str
    samples: F64
    groups: NDArray[np.str_] | None = None
    exponential: bool = False

    @property
    def value(self) -> float:
        """The number."""
        mean = float(np.mean(self._group_means()[0]))
        return float(np.exp(mean)) if self.exponential else mean

    @property
    def stderr(self) -> float | None:
        """Its standard error; None where a group (or the whole) has one sample."""
        return _stderr(self.influence(), self._group_means()[2])

    def influence(self) -> F64:
        """How much each sample moves the value, times n; float64 ``(n,)``, of mean 0."""
        means, index, counts = self._group_means()
        weight = self.samples.size / (len(means) * counts[index])
        values: F64 = weight * (self.samples - means[index])
        return values * self.value if self.exponential else values

    def _group_means(self) -> tuple[F64, NDArray[np.intp], NDArray[np.intp]]:
        """Means (g,), index of each sample's group (n,) and sizes (g,)."""
        if self.groups is None:
            index = np.zeros(self.samples.size, np.intp)
        else:
            index = np.unique(self.groups, return_inverse=True)[1].reshape(-1)
        counts = np.bincount(index)
        return np.bincount(index, self.samples) / counts, index, counts


@dataclass(frozen=True)
class Difference:
    """How much a second model differs from a first.

    Attributes:
        value: Second minus first.
        stderr: Of the paired difference; None where it cannot be told.
    """

    value: float
    stderr: float | None


def difference(first: Measure, second: Measure) -> Difference:
    """Compare two models on the same samples.

    Raises:
        UsageError: The measures are not of the same samples.
    """
    same_groups = first.groups is None or (
        second.groups is not None and np.array_equal(first.groups, second.groups)
    )
    if first.name != second.name or first.samples.shape != second.samples.shape or not same_groups:
        raise UsageError(
            "the measures cannot be paired",
            expected=f"{first.name}, {first.samples.size} samples",
            got=f"{second.name}, {second.samples.size} samples",
        )
    change = second.influence() - first.influence()
    return Difference(second.value - first.value, _stderr(change, first._group_means()[2]))


def _stderr(influence: F64, group_sizes: NDArray[np.intp]) -> float | None:
    n = influence.size
    if group_sizes.min() < 2:
        return None
    return float(np.sqrt(np.square(influence).sum() / (n * (n - 1))))
