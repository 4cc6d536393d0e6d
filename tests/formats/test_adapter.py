"""The algebra of IEC: folding is exact, written against the official expression."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerance import FOLD_FLOAT32, FOLD_FLOAT64

from irq_formats.adapter import (
    LoraLayer,
    branch,
    delta_weight,
    elastic,
    fold,
    random_layer,
    tau_extra_rank,
)
from irq_formats.errors import MalformedFile, UsageError


def layer64(rng: np.random.Generator, n_out: int, n_in: int, rank: int) -> LoraLayer:
    """A float64 layer with projections, betas and scaling of order one."""
    return LoraLayer(
        lora_a=rng.standard_normal((rank, n_in)) / np.sqrt(n_in),
        lora_b=rng.standard_normal((n_out, rank)) / np.sqrt(rank),
        beta1=0.5 + rng.random(),
        beta2=-0.5 - rng.random(),
        scaling=0.25 + rng.random(),
    )


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def released_code(layer: LoraLayer, x: np.ndarray) -> np.ndarray:
    """U1 and U2 as the released code writes them; needs r | in and r | out. x: (n, in)."""
    n_out, n_in = layer.shape
    r = layer.rank
    hidden = x @ layer.lora_a.T
    hidden = hidden + layer.beta1 * x.reshape(-1, r, n_in // r).mean(-1)
    y = hidden @ layer.lora_b.T
    return layer.scaling * (y + layer.beta2 * np.repeat(hidden, n_out // r, axis=-1))


def equation_16(layer: LoraLayer) -> tuple[np.ndarray, np.ndarray]:
    """l1~ (in, r) and l2~ (r, out) element by element, as printed in the paper."""
    n_out, n_in = layer.shape
    r = layer.rank
    g1, g2 = gcd(n_in, r), gcd(n_out, r)
    l1, l2 = layer.lora_a.T.copy(), layer.lora_b.T.copy()
    for i in range(n_in):
        for j in range(r):
            if i * g1 // n_in == j * g1 // r:
                l1[i, j] += layer.beta1 * g1 / n_in
    for i in range(r):
        for j in range(n_out):
            if i * g2 // r == j * g2 // n_out:
                l2[i, j] += layer.beta2 * g2 / r
    return l1, l2


def test_elastic_by_hand():
    x = np.array([1.0, 3.0, 5.0, 9.0])
    np.testing.assert_array_equal(elastic(x, 2), [2, 7])  # group means
    np.testing.assert_array_equal(elastic(x, 8), [1, 1, 3, 3, 5, 5, 9, 9])  # repeated in a row, not tiled
    np.testing.assert_array_equal(elastic(x, 6), [2, 2, 2, 7, 7, 7])  # gcd 2: mean, then repeat
    np.testing.assert_array_equal(elastic(x, 3), [4.5, 4.5, 4.5])  # gcd 1


def test_fold_by_hand_4_2_4():
    """The smallest case: 4 inputs, rank 2, 4 outputs."""
    layer = LoraLayer(np.zeros((2, 4)), np.zeros((4, 2)), beta1=0.5, beta2=3.0)
    folded = fold(layer)
    np.testing.assert_array_equal(folded.lora_a, [[0.25, 0.25, 0, 0], [0, 0, 0.25, 0.25]])
    np.testing.assert_array_equal(folded.lora_b, [[3, 0], [3, 0], [0, 3], [0, 3]])
    assert not folded.has_iec


@pytest.mark.parametrize(
    ("n_out", "n_in", "rank"), [(4, 4, 2), (128, 64, 8), (256, 4096, 64), (688, 256, 16)]
)
def test_fold_equals_released_code(n_out: int, n_in: int, rank: int):
    rng = np.random.default_rng(1)
    layer = layer64(rng, n_out, n_in, rank)
    x = rng.standard_normal((5, n_in))
    want = released_code(layer, x)
    folded = fold(layer)
    assert folded.rank == rank
    assert folded.scaling == layer.scaling
    assert relative(branch(layer, x), want) < FOLD_FLOAT64
    assert relative(branch(folded, x), want) < FOLD_FLOAT64
    assert relative(x @ delta_weight(layer).T, want) < FOLD_FLOAT64
    # the test can fail: without the betas the result is another
    assert relative(branch(replace(layer, beta1=0.0, beta2=0.0), x), want) > 0.01


@given(
    n_out=st.integers(1, 40),
    n_in=st.integers(1, 40),
    rank=st.integers(1, 24),
    seed=st.integers(0, 2**32 - 1),
)
def test_fold_equals_equation_16_for_any_shape(n_out: int, n_in: int, rank: int, seed: int):
    rng = np.random.default_rng(seed)
    layer = layer64(rng, n_out, n_in, rank)
    l1, l2 = equation_16(layer)
    folded = fold(layer)
    np.testing.assert_allclose(folded.lora_a, l1.T, rtol=FOLD_FLOAT64, atol=FOLD_FLOAT64)
    np.testing.assert_allclose(folded.lora_b, l2.T, rtol=FOLD_FLOAT64, atol=FOLD_FLOAT64)
    x = rng.standard_normal((3, n_in))
    want = layer.scaling * (x @ l1 @ l2)
    scale = layer.scaling * (np.abs(x) @ np.abs(l1) @ np.abs(l2)).max()
    assert np.abs(branch(layer, x) - want).max() < FOLD_FLOAT64 * scale


def test_fold_rounds_once_to_float32():
    rng = np.random.default_rng(2)
    wide = layer64(rng, 96, 160, 24)
    narrow = replace(wide, lora_a=wide.lora_a.astype(np.float32), lora_b=wide.lora_b.astype(np.float32))
    exact = fold(
        replace(
            narrow,
            lora_a=narrow.lora_a.astype(np.float64),
            lora_b=narrow.lora_b.astype(np.float64),
        )
    )
    got = fold(narrow)
    assert got.lora_a.dtype == got.lora_b.dtype == np.float32
    np.testing.assert_array_equal(got.lora_a, exact.lora_a.astype(np.float32))
    np.testing.assert_array_equal(got.lora_b, exact.lora_b.astype(np.float32))
    np.testing.assert_array_equal(narrow.lora_a, wide.lora_a.astype(np.float32))  # input untouched


def test_fold_of_plain_lora_is_the_same_object():
    layer = replace(layer64(np.random.default_rng(3), 8, 8, 2), beta1=0.0, beta2=0.0)
    assert fold(layer) is layer


@pytest.mark.parametrize("block_size", [32, 64])
def test_tau_as_extra_rank(block_size: int):
    rng = np.random.default_rng(4)
    n_out, n_in, rank = 48, 5 * block_size, 12
    layer = random_layer((n_out, n_in), 4.0, rng, rank=rank, alpha=24.0)  # scaling 2: exact
    tau = rng.standard_normal((n_out, 5)).astype(np.float32)
    codes = rng.standard_normal((n_out, n_in))  # s·c[q], whatever it is
    lora_a, lora_b = tau_extra_rank(layer, tau, block_size)
    assert lora_a.shape == (rank + 5, n_in)
    assert lora_b.shape == (n_out, rank + 5)
    np.testing.assert_array_equal(lora_b[:, rank:], tau)  # bit for bit
    want = codes + np.repeat(tau, block_size, axis=1) + delta_weight(layer)
    got = codes + lora_b.astype(np.float64) @ lora_a
    assert relative(got, want) < FOLD_FLOAT32
    x = rng.standard_normal((7, n_in))
    assert relative(x @ got.T, x @ want.T) < FOLD_FLOAT32
    # without the extra rank it is far off
    assert relative(codes + delta_weight(layer), want) > 0.1


def test_tau_without_adapter_is_exact():
    tau = np.random.default_rng(5).standard_normal((6, 3)).astype(np.float32)
    lora_a, lora_b = tau_extra_rank(None, tau, 64)
    np.testing.assert_array_equal(lora_b @ lora_a, np.repeat(tau, 64, axis=1))


def test_tau_of_another_layer_is_refused():
    layer = layer64(np.random.default_rng(6), 8, 64, 2)
    with pytest.raises(UsageError, match=r"expected \(out, in\) = \(8, 128\)"):
        tau_extra_rank(layer, np.zeros((8, 2), np.float32), 64)


def test_random_layer_is_seeded_and_of_the_promised_size():
    layers = [random_layer((96, 64), 10.0, np.random.default_rng(7)) for _ in range(2)]
    np.testing.assert_array_equal(layers[0].lora_b, layers[1].lora_b)
    layer = layers[0]
    assert layer.beta1 != 0
    assert layer.beta2 != 0
    plain = delta_weight(replace(layer, beta1=0.0, beta2=0.0))
    assert np.linalg.norm(plain) == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_a": np.zeros((0, 8))}, "rank 0"),
        ({"lora_b": np.zeros((6, 0))}, "rank 0"),
        ({"lora_a": np.zeros((3, 8))}, "do not form a pair"),
        ({"lora_a": np.zeros(8)}, "matrices"),
        ({"lora_a": np.full((2, 8), np.nan)}, "lora_A holds NaN"),
        ({"lora_b": np.full((6, 2), np.inf)}, "lora_B holds NaN"),
        ({"beta1": float("nan")}, "beta1 is not a finite"),
        ({"beta2": float("-inf")}, "beta2 is not a finite"),
        ({"scaling": float("inf")}, "scaling is not a finite"),
    ],
)
def test_unsound_layers_are_refused(change: dict[str, object], message: str):
    layer = LoraLayer(np.zeros((2, 8)), np.zeros((6, 2)))
    layer.validate()
    with pytest.raises(MalformedFile, match=message) as caught:
        replace(layer, **change).validate("some.module")
    assert caught.value.where == "some.module"
    assert caught.value.expected
    assert caught.value.got
