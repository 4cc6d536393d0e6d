"""Halves of stock pairs: both runtimes refuse what does not belong together, and say the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_sources import GgufSource
from model_cases import nmse
from tolerance import NMSE_FLOAT32

from irq_export.cli import main
from irq_export.export.gguf import to_gguf
from irq_formats.blocks import BlockSpec
from irq_formats.errors import IrqError, MalformedFile, UsageError, WrongBase
from irq_formats.gguf import BOOL, STR, U32, GgufValue, TensorSource, open_gguf, write_gguf
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model

VECTORS = Path(__file__).resolve().parents[2] / "formats" / "vectors" / "models"
BASE, ADAPTER = VECTORS / "pair-base.gguf", VECTORS / "pair-adapter.gguf"
TOKENS = [1, 7, 3, 5]
OPENERS = {"reference": load_model, "native": Engine}


@pytest.fixture(params=OPENERS.values(), ids=OPENERS.keys())
def opener(request: pytest.FixtureRequest) -> Callable[..., object]:
    """Either runtime's way to open a model."""
    opened: Callable[..., object] = request.param
    return opened


def rewrite(source: Path, target: Path, change: dict[str, GgufValue | None]) -> Path:
    """Copy a file with other metadata; None removes a key."""
    gguf = open_gguf(source)
    values = {key: value for key, value in {**gguf.values, **change}.items() if value is not None}
    tensors = [
        TensorSource(t.name, t.shape, t.type, lambda name=t.name: gguf.read(name))
        for t in gguf.tensors.values()
    ]
    write_gguf(target, values, tensors)
    return target


class TestHalves:
    def test_a_pair_runs(self) -> None:
        expected = load_model(BASE, ADAPTER).logits(TOKENS)
        assert nmse(Engine(BASE, ADAPTER).logits(TOKENS), expected) < NMSE_FLOAT32

    def test_a_base_alone(self, opener: Callable[..., object], tmp_path: Path) -> None:
        """It would compute another model: the tau of its blocks are elsewhere."""
        with pytest.raises(UsageError, match="one half of a pair") as caught:
            opener(BASE)
        assert str(BASE) in str(caught.value.where)
        marked = open_gguf(BASE).values["irq.stock.tau"]
        whole = rewrite(BASE, tmp_path / "b.gguf", {"irq.stock.tau": BOOL.array([False] * len(marked.value))})
        opener(whole)  # so that the key is what decides

    def test_an_adapter_of_another_base(self, opener: Callable[..., object], tmp_path: Path) -> None:
        other = rewrite(ADAPTER, tmp_path / "a.gguf", {"irq.adapter.base_hash": STR("cd" * 32)})
        with pytest.raises(WrongBase, match="another quantised base") as caught:
            opener(BASE, other)
        assert caught.value.exit_code == 3
        opener(BASE, rewrite(ADAPTER, tmp_path / "n.gguf", {"irq.adapter.base_hash": None}))

    @pytest.mark.parametrize(
        "change",
        [
            {"irq.stock.tau_rank": U32.array([1, 0])},
            {"irq.stock.tau_rank": None},
            {"irq.stock.name": STR.array(["blk.0.attn_output", "blk.0.ffn_up"])},
        ],
        ids=["one lost", "a LoRA of somebody else", "another matrix"],
    )
    def test_an_adapter_without_the_offsets(
        self, change: dict[str, GgufValue | None], opener: Callable[..., object], tmp_path: Path
    ) -> None:
        other = rewrite(ADAPTER, tmp_path / "a.gguf", change)
        with pytest.raises(WrongBase, match="not of one pair"):
            opener(BASE, other)

    def test_offsets_twice(self, opener: Callable[..., object], tmp_path: Path) -> None:
        """A base that holds the offsets itself (bf16, merged) and an adapter that brings them again."""
        merged = rewrite(BASE, tmp_path / "b.gguf", {"irq.stock.tau": None, "irq.stock.name": None})
        with pytest.raises(WrongBase, match="the base lacks none"):
            opener(merged, ADAPTER)

    @pytest.mark.parametrize(
        "change",
        [
            {"irq.stock.tau": BOOL.array([True])},
            {"irq.stock.tau": U32.array([1, 1])},
            {"irq.stock.name": None},
            {"irq.base_hash": STR("5E" * 32)},
            {"irq.base_hash": U32(5)},
        ],
        ids=["short", "numbers", "no names", "upper case", "no text"],
    )
    def test_malformed_keys(
        self, change: dict[str, GgufValue | None], opener: Callable[..., object], tmp_path: Path
    ) -> None:
        with pytest.raises(MalformedFile):
            opener(rewrite(BASE, tmp_path / "b.gguf", change), ADAPTER)

    def test_both_say_the_same(self, tmp_path: Path) -> None:
        other = rewrite(ADAPTER, tmp_path / "a.gguf", {"irq.stock.tau_rank": U32.array([0, 1])})

        def said(opener: Callable[..., object]) -> list[tuple[str, object, object]]:
            errors = []
            for files in ((BASE,), (BASE, other)):
                with pytest.raises(IrqError) as caught:
                    opener(*files)
                error = caught.value
                errors.append((error.message, str(error.where), error.expected))
            return errors

        assert said(load_model) == said(Engine)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``to-gguf`` writes: with tau in the adapter, with tau in the base, and without tau."""
    work = tmp_path_factory.mktemp("pairs")
    source = GgufSource(work, BlockSpec("nf4"))
    to_gguf(source.path, work / "pair", profile="stock", adapter_dir=source.adapter_dir)
    to_gguf(source.path, work / "bf16", profile="stock", adapter_dir=source.adapter_dir, nf_type="bf16")
    (work / "plain").mkdir()
    plain = GgufSource(work / "plain", BlockSpec("nf4", tau="none"))
    to_gguf(plain.path, work / "no-tau", profile="stock", adapter_dir=plain.adapter_dir)
    return work


class TestExported:
    """Through the commands."""

    @staticmethod
    def bench(*arguments: object) -> str:
        """Open a model by a command; return what it says when it refuses."""
        call = ["bench", *map(str, arguments), "-p", "2", "-n", "1", "-r", "1", "-t", "1"]
        result = CliRunner().invoke(main, call)
        assert result.exit_code in (0, 2, 3), result.output
        return f"{result.exit_code} {result.output}"

    def test_commands(self, work: Path) -> None:
        pair, bf16, no_tau = work / "pair", work / "bf16", work / "no-tau"
        for good in (pair, bf16, no_tau, bf16 / "base.gguf", no_tau / "base.gguf"):
            assert self.bench(good).startswith("0")
        assert self.bench(pair / "base.gguf").startswith("2")
        mixed = self.bench(pair / "base.gguf", "--adapter", no_tau / "adapter.gguf")
        assert mixed.startswith("3")
        assert "another quantised base" in mixed
        for base, adapter in ((pair, bf16), (bf16, pair)):  # of one checkpoint, but not of one export
            mixed = self.bench(base / "base.gguf", "--adapter", adapter / "adapter.gguf")
            assert mixed.startswith("3")
            assert "not of one pair" in mixed

    def test_inspect_says_so(self, work: Path) -> None:
        shown = {
            name: CliRunner().invoke(main, ["inspect", str(work / name)]).output for name in ("pair", "bf16")
        }
        assert "needed, for the block offsets of 14 layers" in shown["pair"]
        assert "needed" not in shown["bf16"]

    def test_scale_zero_is_the_codes_alone(self, work: Path) -> None:
        """Who wants them asks for them."""
        files = work / "pair" / "base.gguf", work / "pair" / "adapter.gguf"
        assert np.isfinite(Engine(*files, 0.0).logits(TOKENS)).all()
