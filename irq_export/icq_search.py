"""The exact ICQ search: which scale and offset a block of weights gets (IR-QLoRA, arXiv 2402.05445, §3.2).

Every implementation (this one, C++ on a CPU, Triton on CUDA) must return the same bits, so the definition
leaves nothing open. All arithmetic is IEEE float32, round to nearest even, one rounding per operation, no
fused multiply-add, no flush to zero; ``fl`` marks a rounding. For a block ``w[0..B-1]`` in its own order:

1. ``tau0`` = the lower median (the ``B/2``-th smallest), ``A = max fl|w - tau0|``.
2. Candidates ``i = 0 .. 2n``: ``f_i = fl32(((i - n) / n * tau_range) * SIGMA)``, evaluated in float64 from
   left to right; ``t_i = fl(fl(f_i * A) + tau0)``; ``s_i = max fl|w - t_i|``.
3. The pair of a candidate is ``(s_i, t_i)`` for nf codebooks. For int-k it is ``d = fl(s_i / h)`` with
   ``h = (2**k - 1) / 2`` and the offset ``fl(t_i + fl(d / 2))``: 2**k levels symmetric around ``t_i``.
   Without a search it is ``s = max|w|``, ``tau = 0``; for int-k then ``d = fl(s / h)`` and no half step, so
   the levels are ``d * (q - 2**(k-1))``.
4. Codes follow the codec: the number of thresholds ``fl(fl(scale * midpoint_k) + tau)`` strictly below w;
   where the scale is zero, the codebook's zero code.
5. Entropy in fixed point, int64: ``H = sum over codes of T[count]`` with
   ``T[n] = round(-(n/B) * log2(n/B) * 2**40)``. Squared error: ``e = fl(w - fl(fl(scale * level) + tau))``,
   ``fl(e * e)``, summed by halving: ``x[:B/2] + x[B/2:]`` until one value is left.
6. ``objective="entropy"``: the largest H wins; among equal ones ``tie="mse"`` takes the least squared error,
   ``tie="first"`` the first. ``objective="mse"``: the least squared error wins. Whatever is still equal goes
   to the smallest i.
7. ``refine="ls"``: with ``c = levels[code]`` of the winner, all in float64, sums by halving: means
   ``mc = sum(c)/B``, ``mw = sum(w)/B``; ``slope = sum((c - mc) * (w - mw)) / sum((c - mc) * (c - mc))``; the
   pair becomes ``(fl32(slope), fl32(mw - slope * mc))``. Where the file holds no offset:
   ``slope = sum(c * w) / sum(c * c)``. The pair is kept where the denominator is 0 or ``fl32(slope)`` is not
   above 0. Codes are chosen again when stored.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from irq_export import kernels
from irq_formats.codebooks import CODEBOOKS
from irq_formats.errors import UsageError

__all__ = [
    "SIGMA",
    "SearchConfig",
    "block_codes",
    "block_entropy",
    "entropy_table",
    "plain_entropy",
    "runs_natively",
    "search_blocks",
]

#: 1 / ppf(0.9677083), both in float32 as scipy evaluates them in the released code, inverted in float64.
SIGMA = 0.5410872368978237
#: Candidates the native kernel has room for.
_NATIVE_CANDIDATES = 4096
#: Fixed-point unit of the entropy: one bit is this many.
ENTROPY_UNIT = 1 << 40


@dataclass(frozen=True)
class SearchConfig:
    """How scale and offset of each block are found.

    Attributes:
        icq: Search the offset; otherwise the offset is 0 and the scale the absolute maximum.
        objective: ``entropy`` (the paper) or ``mse``.
        tie: Among candidates of equal entropy: ``mse`` least squared error, ``first`` most negative.
        refine: ``ls`` refits the pair by least squares on the codes; ``none`` is the paper.
        numerics: ``exact`` (this module) or ``reference`` (the released code, icq_reference).
        tau_range: Largest shift of the offset in units of ``SIGMA * max|w - median|``.
        tau_steps: Steps to either side: ``2 * tau_steps + 1`` candidates.

    Raises:
        UsageError: An unknown value, or a combination the released numerics do not have.
    """

    icq: bool = True
    objective: str = "entropy"
    tie: str = "mse"
    refine: str = "ls"
    numerics: str = "exact"
    tau_range: float = 0.1
    tau_steps: int = 100

    def __post_init__(self) -> None:
        for name, allowed in (
            ("objective", ("entropy", "mse")),
            ("tie", ("mse", "first")),
            ("refine", ("ls", "none")),
            ("numerics", ("exact", "reference")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"unknown {name}", expected=" | ".join(allowed), got=getattr(self, name))
        if not (math.isfinite(self.tau_range) and self.tau_range >= 0 and self.tau_steps >= 1):
            raise UsageError(
                "the search grid is empty",
                expected="tau_range >= 0 and tau_steps >= 1",
                got=f"{self.tau_range}, {self.tau_steps}",
            )
        if self.numerics == "reference" and (
            self.refine != "none" or (self.icq and (self.objective, self.tie) != ("entropy", "first"))
        ):
            raise UsageError(
                "the released method has neither a refit nor a squared error",
                expected="refine none, objective entropy, tie first",
                got=f"refine {self.refine}, objective {self.objective}, tie {self.tie}",
                hint="Give refine none, objective entropy and tie first, or numerics exact",
            )

    @classmethod
    def released(cls, *, icq: bool = True) -> SearchConfig:
        """The released code; with ``icq=False`` plain QLoRA, equal to bitsandbytes."""
        return cls(icq=icq, tie="first", refine="none", numerics="reference")

    @classmethod
    def for_codebook(cls, codebook: str, *, icq: bool | None = None, **values: Any) -> SearchConfig:
        """The default of ``quantize``: nf4 is searched only where somebody asks for it (docs/paper.md).

        Args:
            codebook: Of the codes.
            icq: Whether to search. None: for every codebook but nf4, and for nf4 where ``objective`` or
                ``tie`` is not the default.
            **values: The other fields.

        Raises:
            UsageError: As the constructor.
        """
        if icq is None:
            how = (values.get("objective", cls.objective), values.get("tie", cls.tie))
            icq = codebook != "nf4" or how != (cls.objective, cls.tie)
        return cls(icq=icq, **values)

    def to_dict(self) -> dict[str, str | int | float | bool]:
        """Return the fields, for JSON."""
        return asdict(self)

    def factors(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The candidates ``f_i``, float32 ``(2 * tau_steps + 1,)``, ascending (step 2 of the definition)."""
        n = self.tau_steps
        steps = np.arange(-n, n + 1, dtype=np.float64)
        return ((steps / n * self.tau_range) * SIGMA).astype(np.float32)


class _Book(NamedTuple):
    """A codebook on a device: levels f32 (2**k,), midpoints f32 (2**k - 1,), entropy table int64 (B + 1,)."""

    levels: Tensor
    midpoints: Tensor
    table: Tensor
    zero_code: int
    half_range: Tensor | None  # (2**k - 1) / 2 of int-k; a tensor, since CUDA multiplies by 1 / scalar


def entropy_table(block_size: int) -> list[int]:
    """The table T of step 5: what a code that ``n = 0..B`` weights have adds to the entropy, fixed point."""
    shares = [n / block_size for n in range(1, block_size + 1)]
    return [0, *(round(-p * math.log2(p) * ENTROPY_UNIT) for p in shares)]


def _book(name: str, block_size: int, device: torch.device) -> _Book:
    book = CODEBOOKS[name]
    return _Book(
        torch.tensor(book.levels, device=device),
        torch.tensor(book.midpoints, device=device),
        torch.tensor(entropy_table(block_size), device=device),
        book.zero_code,
        torch.tensor((2**book.bits - 1) / 2, device=device) if book.affine else None,
    )


def _tree_sum(x: Tensor) -> Tensor:
    """Sum the last dimension (a power of two) by halving: (..., B) -> (...)."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _plain_pair(blocks: Tensor, book: _Book) -> tuple[Tensor, Tensor]:
    """Scale and offset without a search, f32 (n,) each: absolute maximum, 0."""
    absmax = blocks.abs().amax(dim=1)
    scale = absmax if book.half_range is None else absmax / book.half_range
    return scale, torch.zeros_like(scale)


def _candidate_pair(low: Tensor, high: Tensor, t: Tensor, book: _Book) -> tuple[Tensor, Tensor]:
    """Step 3 for blocks within [low, high] and offsets t: rounding is monotone, so the ends decide s."""
    s = torch.maximum(high - t, t - low)
    if book.half_range is None:
        return s, t
    d = s / book.half_range
    return d, t + d / 2


def _entropy(ordered: Tensor, scales: Tensor, taus: Tensor, book: _Book) -> Tensor:
    """Fixed-point entropy int64 (n, g) of the codes of sorted blocks f32 (n, B) at pairs f32 (n, g)."""
    thresholds = scales[..., None] * book.midpoints + taus[..., None]  # (n, g, 2**k - 1), ascending
    below = torch.searchsorted(
        ordered, thresholds.flatten(1), right=True, out_int32=True
    )  # weights not above
    edges = torch.nn.functional.pad(below.view(thresholds.shape), (1, 1))
    edges[..., -1] = ordered.shape[1]
    counts = edges.diff(dim=-1)
    entropy = book.table.index_select(0, counts.reshape(-1)).view(counts.shape).sum(dim=-1)
    return entropy.masked_fill_(scales == 0, 0)


def _codes(blocks: Tensor, scale: Tensor, tau: Tensor, book: _Book) -> Tensor:
    """Codes int32 (n, B) of blocks f32 (n, B), step 4."""
    thresholds = scale[:, None] * book.midpoints + tau[:, None]
    codes = torch.searchsorted(thresholds, blocks, out_int32=True)
    return codes.masked_fill_((scale == 0)[:, None], book.zero_code)


def _squared_error(blocks: Tensor, scale: Tensor, tau: Tensor, book: _Book) -> Tensor:
    """Squared error f32 (n,) of blocks f32 (n, B), step 5."""
    codes = _codes(blocks, scale, tau, book)
    decoded = book.levels.index_select(0, codes.reshape(-1)).view(blocks.shape)
    error = decoded.mul_(scale[:, None]).add_(tau[:, None]).neg_().add_(blocks)
    return _tree_sum(error.mul_(error))


def _least_error(
    blocks: Tensor, scales: Tensor, taus: Tensor, allowed: Tensor, book: _Book, pairs_at_once: int
) -> Tensor:
    """Index int64 (n,) of the allowed candidate of least error; equal errors go to the first.

    blocks f32 (n, B); scales, taus f32 (n, candidates); allowed bool (n, candidates), one at least a row.
    """
    n, candidates = allowed.shape
    best = torch.full((n,), math.inf, device=blocks.device)
    errors = []
    row, column = allowed.nonzero(as_tuple=True)
    for r, c in zip(*(torch.split(x, pairs_at_once) for x in (row, column)), strict=True):
        error = _squared_error(blocks[r], scales[r, c], taus[r, c], book)
        best.scatter_reduce_(0, r, error, "amin")
        errors.append(error)
    winner = torch.full((n,), candidates, dtype=torch.int64, device=blocks.device)
    wins = torch.cat(errors) == best[row]
    return winner.scatter_reduce_(0, row[wins], column[wins], "amin")


def _search(blocks: Tensor, config: SearchConfig, book: _Book, pairs_at_once: int) -> tuple[Tensor, Tensor]:
    """Steps 1 to 6: scale and offset f32 (n,) of blocks f32 (n, B)."""
    ordered = blocks.sort(dim=1).values
    low, high, median = ordered[:, 0], ordered[:, -1], ordered[:, blocks.shape[1] // 2 - 1]
    reach = torch.maximum(high - median, median - low)
    factors = torch.from_numpy(config.factors()).to(blocks.device)
    t = reach[:, None] * factors + median[:, None]  # (n, candidates)
    scales, taus = _candidate_pair(low[:, None], high[:, None], t, book)
    if config.objective == "entropy":
        columns = max(1, pairs_at_once // len(blocks))
        steps = zip(*(torch.split(x, columns, dim=1) for x in (scales, taus)), strict=True)
        entropy = torch.cat([_entropy(ordered, s, o, book) for s, o in steps], dim=1)
        allowed = entropy == entropy.amax(dim=1, keepdim=True)
    else:
        allowed = torch.ones_like(t, dtype=torch.bool)
    allowed[:, 1:] &= (reach > 0)[:, None]  # the candidates of a constant block are all the same
    if config.objective == "entropy" and config.tie == "first":
        winner = allowed.to(torch.uint8).argmax(dim=1)
    else:
        winner = _least_error(blocks, scales, taus, allowed, book, pairs_at_once)
    return scales.gather(1, winner[:, None])[:, 0], taus.gather(1, winner[:, None])[:, 0]


def _refit(blocks: Tensor, scale: Tensor, tau: Tensor, book: _Book, with_tau: bool) -> tuple[Tensor, Tensor]:
    """Step 7."""
    codes = _codes(blocks, scale, tau, book)
    c = book.levels.double().index_select(0, codes.reshape(-1)).view(blocks.shape)
    w = blocks.double()
    size = blocks.shape[1]
    mc, mw = (_tree_sum(x) / size if with_tau else torch.zeros_like(x[:, 0]) for x in (c, w))
    c -= mc[:, None]
    w -= mw[:, None]
    variance = _tree_sum(c * c)
    slope = _tree_sum(c * w) / variance
    offset = (mw - slope * mc).float()
    better = (variance > 0) & (slope.float() > 0)
    return torch.where(better, slope.float(), scale), torch.where(better, offset, tau)


@cache
def _native_is_built() -> bool:
    """False in a bare source tree, such as one that was copied to a GPU."""
    return find_spec("irq_runtime._native") is not None


def runs_natively(device: torch.device, config: SearchConfig | None = None) -> bool:
    """Whether the native module does the work (:mod:`irq_export.icq_native`): on a CPU wherever it can."""
    fits = config is None or 2 * config.tau_steps < _NATIVE_CANDIDATES
    return device.type == "cpu" and fits and _native_is_built()


def search_blocks(
    blocks: Tensor, codebook: str, config: SearchConfig, *, with_tau: bool, pairs_at_once: int = 1 << 15
) -> tuple[Tensor, Tensor]:
    """Find scale and offset of every block as the module's docstring defines.

    Args:
        blocks: float32 ``(n, B)``, magnitudes at most 2**125; one block a row, B 32 or 64.
        codebook: Name of the codebook.
        config: What to search for; ``numerics`` is not read.
        with_tau: Whether the file will hold an offset.
        pairs_at_once: Bound on (block, candidate) pairs evaluated together (memory).

    Returns:
        scale float32 ``(n,)``, not negative, and tau float32 ``(n,)``.
    """
    if config.icq and kernels.available(blocks.device):
        from irq_export.kernels.icq import search

        return search(blocks, codebook, config, with_tau=with_tau)
    if runs_natively(blocks.device, config):
        from irq_export import icq_native

        return icq_native.search(blocks, codebook, config, with_tau=with_tau)
    book = _book(codebook, blocks.shape[1], blocks.device)
    scale, tau = _search(blocks, config, book, pairs_at_once) if config.icq else _plain_pair(blocks, book)
    if not config.icq and with_tau:  # a constant block decodes exactly wherever there is an offset
        constant = (blocks == blocks[:, :1]).all(dim=1)
        scale, tau = scale.masked_fill(constant, 0), torch.where(constant, blocks[:, 0], tau)
    return _refit(blocks, scale, tau, book, with_tau) if config.refine == "ls" else (scale, tau)


def plain_entropy(blocks: Tensor, codebook: str) -> int:
    """Sum over blocks f32 (n, B) of the entropy of the plain codes (step 3 without a search), fixed point."""
    if runs_natively(blocks.device):
        from irq_export import icq_native

        return icq_native.plain_entropy(blocks, codebook)
    book = _book(codebook, blocks.shape[1], blocks.device)
    scale, tau = _plain_pair(blocks, book)
    return int(_entropy(blocks.sort(dim=1).values, scale[:, None], tau[:, None], book).sum())


def block_codes(blocks: Tensor, scale: Tensor, tau: Tensor, codebook: str) -> Tensor:
    """Codes uint8 (n, B) of blocks f32 (n, B) at pairs f32 (n,): step 4, as the codec chooses them."""
    return _codes(blocks, scale, tau, _book(codebook, blocks.shape[1], blocks.device)).to(torch.uint8)


def block_entropy(codes: Tensor, codebook: str) -> int:
    """Sum over blocks of the entropy of their codes uint8 (n, B), fixed point (``ENTROPY_UNIT`` a bit)."""
    book = _book(codebook, codes.shape[1], codes.device)
    blocks, levels = len(codes), len(book.levels)
    first = torch.arange(0, blocks * levels, levels, device=codes.device)
    counts = torch.bincount((codes + first[:, None]).reshape(-1), minlength=blocks * levels)
    return int(book.table[counts].sum())
