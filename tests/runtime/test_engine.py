"""The native engine against the reference runtime, its executable specification."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from malformed_corpus import CORPUS, Case, load_cases
from model_cases import nmse
from tiny_files import (
    BASE_HASH,
    block_tensors,
    irq_parts,
    model_config,
    permute,
    source,
    state_f32,
    write_irq,
    write_irq_adapter,
    write_stock,
    write_stock_adapter,
)
from tiny_models import tiny_model, tiny_tokens
from tolerance import NMSE_FAST_TINY, NMSE_FLOAT32, NMSE_HALF_CACHE
from transformers import PreTrainedModel

from irq_formats.adapter import LoraLayer, random_layer, tau_extra_rank
from irq_formats.blocks import BlockSpec, BlockTensor, encode_int8
from irq_formats.errors import IrqError, MalformedFile, UnsupportedModel, UsageError, WrongBase
from irq_formats.gguf import GgufValue, TensorSource
from irq_formats.names import hf_to_gguf
from irq_runtime import _native
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model
from irq_runtime.sampling import SamplingParams, generate
from tests.formats.test_irq_payload import CASES, Parts


def random_adapter(blocks: dict[str, BlockTensor], rank: int = 12) -> dict[str, LoraLayer]:
    rng = np.random.default_rng(1)
    return {
        module: random_layer(tensor.shape, float(np.linalg.norm(tensor.dequantize())), rng, rank=rank)
        for module, tensor in blocks.items()
    }


@pytest.fixture(scope="module")
def irq_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in nf4 with an embedded adapter that has elastic connections."""
    model = tiny_model()
    blocks = block_tensors(model, BlockSpec("nf4"))
    path = tmp_path_factory.mktemp("engine") / "m.gguf"
    write_irq(path, model, blocks, random_adapter(blocks))
    return path


class TestLoader:
    @pytest.mark.parametrize("case", load_cases("gguf"), ids=lambda case: case.name)
    def test_malformed_corpus(self, case: Case) -> None:
        """Refused where Python refuses, for the reason Python names."""
        with pytest.raises(MalformedFile if case.level == "container" else IrqError) as caught:
            _native.check_gguf(str(CORPUS / case.file), case.level == "model")
        assert case.message in str(caught.value)

    def test_sound_file_is_accepted(self, irq_file: Path) -> None:
        """Else every case above might be refused for a fault they share."""
        names = _native.check_gguf(str(irq_file), True)
        assert "blk.0.attn_q.codes" in names
        assert names == sorted(names)

    def test_every_truncation_is_refused(self, irq_file: Path, tmp_path: Path) -> None:
        whole = irq_file.read_bytes()
        cut = tmp_path / "cut.gguf"
        for size in [*range(0, 600, 7), *range(600, len(whole), len(whole) // 50)]:
            cut.write_bytes(whole[:size])
            with pytest.raises(MalformedFile):
                Engine(cut)

    @pytest.mark.parametrize("path", ["nothing.gguf", "."])
    def test_no_such_file(self, path: str, tmp_path: Path) -> None:
        with pytest.raises((UsageError, MalformedFile)):
            Engine(tmp_path / path)

    def test_a_pipe_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(MalformedFile, match="regular"):
            Engine(tmp_path / "pipe")

    def test_a_file_that_changes_is_noticed(self, irq_file: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(irq_file.read_bytes())
        engine = Engine(path)
        cache = engine.new_cache()
        engine.step([1, 2], cache)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(MalformedFile, match="changed"):
            engine.step([3], cache)
        assert cache.length == 2

    def test_types_without_kernels(self, tmp_path: Path) -> None:
        from irq_formats.gguf import STR, GgmlType, TensorSource, write_gguf
        from irq_formats.gguf.model_keys import model_metadata

        model = tiny_model()
        config = model_config(model)
        sources = [source(name, array) for name, array in state_f32(model).items()]
        q8_1 = TensorSource(
            "blk.0.ffn_up.weight", (192, 128), GgmlType.Q5_0, lambda: np.zeros((192, 88), np.uint8)
        )
        sources = [q8_1 if s.name == q8_1.name else s for s in sources]
        header = {"general.architecture": STR("llama"), **model_metadata(config, "llama")}
        write_gguf(tmp_path / "m.gguf", header, sources)
        with pytest.raises(UnsupportedModel, match="Q5_0"):
            Engine(tmp_path / "m.gguf")


def q4_1(weight: np.ndarray) -> np.ndarray:
    """Encode as ggml's Q4_1 (irq_formats has no encoder): uint8 (out, in / 32 * 20)."""
    blocks = weight.reshape(weight.shape[0], -1, 32)
    low = blocks.min(axis=2, keepdims=True)
    step = (blocks.max(axis=2, keepdims=True) - low) / 15
    code = np.rint((blocks - low) / step).astype(np.uint8)
    packed = code[..., :16] | code[..., 16:] << 4
    scales = np.concatenate([step, low], axis=2).astype(np.float16).view(np.uint8)
    return np.concatenate([scales, packed], axis=2).reshape(weight.shape[0], -1)


class TestStock:
    def test_equals_the_reference(self, model: PreTrainedModel, tmp_path: Path) -> None:
        """A prompt in two batches, then tokens one by one."""
        write_stock(tmp_path / "m.gguf", model)
        tokens = tiny_tokens(model, 140)[0].tolist()
        expected = load_model(tmp_path / "m.gguf").logits(tokens)
        engine = Engine(tmp_path / "m.gguf")
        assert nmse(engine.logits(tokens), expected) < NMSE_FLOAT32
        cache = engine.new_cache()
        parts = [engine.step(part, cache) for part in (tokens[:100], tokens[100:137])]
        parts += [engine.step([token], cache) for token in tokens[137:]]
        assert nmse(np.concatenate(parts), expected) < NMSE_FLOAT32

    @pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
    def test_carriers(self, kind: str, tmp_path: Path) -> None:
        from irq_formats.gguf import STR, GgmlType, TensorSource, write_gguf
        from irq_formats.gguf.model_keys import model_metadata
        from irq_formats.gguf.stock_blocks import quantize

        model = tiny_model()
        config = model_config(model)
        sources = []
        for name, array in state_f32(model).items():
            if "attn_q" in name or "attn_k" in name:
                array = permute(array, array.shape[0] // config.head_dim)
            if array.ndim == 1:
                sources.append(source(name, array))
                continue
            raw = q4_1(array) if kind == "Q4_1" else quantize(array, GgmlType[kind])
            sources.append(TensorSource(name, array.shape, GgmlType[kind], lambda raw=raw: raw))
        header = {"general.architecture": STR("llama"), **model_metadata(config, "llama")}
        write_gguf(tmp_path / "m.gguf", header, sources)
        tokens = tiny_tokens(model, 40)[0].tolist()
        expected = load_model(tmp_path / "m.gguf").logits(tokens)
        assert nmse(Engine(tmp_path / "m.gguf").logits(tokens), expected) < NMSE_FLOAT32

    @pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (24.0, 1.0), (0.0, 0.5)])
    def test_adapter_with_tau(self, alpha: float, scale: float, tmp_path: Path) -> None:
        model = tiny_model()
        write_stock(tmp_path / "m.gguf", model)
        blocks = block_tensors(model, BlockSpec("int4"))
        pairs = {
            hf_to_gguf(module): tau_extra_rank(layer, blocks[module].tau(), 64)
            for module, layer in random_adapter(blocks).items()
        }
        write_stock_adapter(tmp_path / "a.gguf", "llama", pairs, alpha)
        tokens = tiny_tokens(model, 40)[0].tolist()
        expected = load_model(tmp_path / "m.gguf", tmp_path / "a.gguf", scale).logits(tokens)
        got = Engine(tmp_path / "m.gguf", tmp_path / "a.gguf", scale).logits(tokens)
        assert nmse(got, expected) < NMSE_FLOAT32
        assert nmse(Engine(tmp_path / "m.gguf").logits(tokens), expected) > 1e-4


class TestIrq:
    @pytest.mark.parametrize(
        ("family", "spec"),
        [
            ("llama", BlockSpec("nf4")),
            ("mistral", BlockSpec("nf3", 32)),
            ("qwen2", BlockSpec("nf2", scale="f16", tau="f16")),
            ("qwen3", BlockSpec("int4", scale="f32", tau="f32")),
            ("llama", BlockSpec("int3", scale_rounding="none")),
            ("llama", BlockSpec("int2", tau="none")),
        ],
        ids=str,
    )
    def test_blocks_and_iec(self, family: str, spec: BlockSpec, tmp_path: Path) -> None:
        model = tiny_model(family, **({"sliding_window": None} if family == "mistral" else {}))
        blocks = block_tensors(model, spec)
        write_irq(tmp_path / "m.gguf", model, blocks, random_adapter(blocks))
        tokens = tiny_tokens(model, 60)[0].tolist()
        expected = load_model(tmp_path / "m.gguf").logits(tokens)
        assert nmse(Engine(tmp_path / "m.gguf").logits(tokens), expected) < NMSE_FLOAT32

    @pytest.mark.parametrize("tied", [True, False])
    def test_int8_embedding(self, tied: bool, tmp_path: Path) -> None:
        model = tiny_model(tied=tied)
        embedding = encode_int8(model.model.embed_tokens.weight.detach().numpy())
        blocks = {"model.embed_tokens": embedding, **block_tensors(model, BlockSpec("nf4"))}
        write_irq(tmp_path / "m.gguf", model, blocks)
        tokens = tiny_tokens(model)[0].tolist()
        expected = load_model(tmp_path / "m.gguf").logits(tokens)
        assert nmse(Engine(tmp_path / "m.gguf").logits(tokens), expected) < NMSE_FLOAT32

    def test_separate_adapter(self, tmp_path: Path) -> None:
        model = tiny_model()
        blocks = block_tensors(model, BlockSpec("nf4"))
        adapter = random_adapter(blocks)
        write_irq(tmp_path / "both.gguf", model, blocks, adapter)
        write_irq(tmp_path / "m.gguf", model, blocks)
        write_irq_adapter(tmp_path / "a.gguf", adapter, BASE_HASH)
        write_irq_adapter(tmp_path / "other.gguf", adapter, "cd" * 32)
        tokens = tiny_tokens(model)[0].tolist()
        separate = Engine(tmp_path / "m.gguf", tmp_path / "a.gguf").logits(tokens)
        assert np.array_equal(separate, Engine(tmp_path / "both.gguf").logits(tokens))
        half = load_model(tmp_path / "m.gguf", tmp_path / "a.gguf", 0.5).logits(tokens)
        assert nmse(Engine(tmp_path / "m.gguf", tmp_path / "a.gguf", 0.5).logits(tokens), half) < NMSE_FLOAT32
        with pytest.raises(UsageError, match="embeds an adapter"):
            Engine(tmp_path / "both.gguf", tmp_path / "a.gguf")
        with pytest.raises(UsageError, match="is an adapter"):
            Engine(tmp_path / "a.gguf")
        with pytest.raises(WrongBase):
            Engine(tmp_path / "m.gguf", tmp_path / "other.gguf")

    def test_fast_is_near(self, irq_file: Path) -> None:
        """One by one, and as a prompt."""
        tokens = list(range(40))
        expected = Engine(irq_file).logits(tokens)
        engine = Engine(irq_file, mode="fast")
        cache = engine.new_cache()
        stepped = np.concatenate([engine.step([token], cache) for token in tokens])
        bound = NMSE_FAST_TINY["bytes" if _native.isa() in ("avx512", "dotprod", "scalar8") else "words"]
        assert NMSE_FLOAT32 < nmse(stepped, expected) < bound
        assert nmse(engine.logits(tokens), expected) < bound

    def test_half_cache_is_near(self, irq_file: Path) -> None:
        tokens = list(range(40))
        error = nmse(Engine(irq_file, half_cache=True).logits(tokens), Engine(irq_file).logits(tokens))
        assert 0 < error < NMSE_HALF_CACHE


class TestSequences:
    def test_results_do_not_depend_on_threads(self, irq_file: Path) -> None:
        tokens = list(range(50))
        expected = Engine(irq_file, threads=1).logits(tokens)
        for threads in (2, 3, 7):
            assert np.array_equal(Engine(irq_file, threads=threads).logits(tokens), expected)

    def test_batches_beyond_the_workspace(self, tmp_path: Path) -> None:
        """300 tokens are two batches; the second attends to the first."""
        model = tiny_model(max_position_embeddings=512)
        write_stock(tmp_path / "m.gguf", model)
        tokens = tiny_tokens(model, 300)[0].tolist()
        got = Engine(tmp_path / "m.gguf").logits(tokens)
        assert nmse(got, load_model(tmp_path / "m.gguf").logits(tokens)) < NMSE_FLOAT32

    def test_sequences_decode_together(self, irq_file: Path) -> None:
        engine = Engine(irq_file)
        prompts = [[1, 2, 3], [7] * 20, [100, 50]]
        alone, together = ([engine.new_cache() for _ in prompts] for _ in range(2))
        for prompt, *caches in zip(prompts, alone, together, strict=True):
            for cache in caches:
                engine.step(prompt, cache)
        expected = [engine.step([t], cache)[0] for t, cache in zip([5, 6, 7], alone, strict=True)]
        got = engine.step_each([5, 6, 7], together)
        assert nmse(got, np.stack(expected)) < NMSE_FLOAT32
        assert [cache.length for cache in together] == [4, 21, 3]

    @pytest.mark.parametrize("mode", ["exact", "fast"])
    def test_up_to_eight_decode_as_alone(self, irq_file: Path, mode: str) -> None:
        """To the bit, adapters included."""
        engine = Engine(irq_file, mode=mode)
        prompts = [[n, 3 * n, 2] for n in range(1, 9)]
        for count in range(1, 9):
            together, alone = ([engine.new_cache() for _ in range(count)] for _ in range(2))
            for prompt, *caches in zip(prompts, together, alone, strict=False):
                for cache in caches:
                    engine.step(prompt, cache)
            tokens = list(range(40, 40 + count))
            expected = [engine.step([token], cache)[0] for token, cache in zip(tokens, alone, strict=True)]
            got = engine.step_each(tokens, together)
            assert np.array_equal(got, np.stack(expected))

    def test_truncate(self, irq_file: Path) -> None:
        engine = Engine(irq_file)
        cache = engine.new_cache()
        engine.step([1, 2, 3, 4], cache)
        cache.truncate(2)
        again = engine.step([9], cache)
        assert cache.length == 3
        assert nmse(again, engine.logits([1, 2, 9])[-1:]) < NMSE_FLOAT32

    def test_a_full_sequence_is_refused_whole(self, irq_file: Path) -> None:
        engine = Engine(irq_file, context=10)
        cache = engine.new_cache()
        engine.step(list(range(8)), cache)
        with pytest.raises(UsageError, match="full"):
            engine.step([1, 2, 3], cache)
        assert cache.length == 8
        engine.step([1, 2], cache)
        assert (cache.length, cache.capacity) == (10, 10)

    @pytest.mark.parametrize("tokens", [[], [-1], [259], [1 << 40], [[1]], [0.5]], ids=str)
    def test_bad_tokens(self, irq_file: Path, tokens: list[object]) -> None:
        with pytest.raises(UsageError):
            Engine(irq_file).logits(tokens)

    @pytest.mark.parametrize(
        "options", [{"threads": 0}, {"threads": 1000}, {"mode": "best"}, {"context": 0}], ids=str
    )
    def test_bad_options(self, irq_file: Path, options: dict[str, object]) -> None:
        with pytest.raises(UsageError):
            Engine(irq_file, **options)

    def test_a_sequence_of_another_engine(self, irq_file: Path) -> None:
        short, long = Engine(irq_file, context=8), Engine(irq_file, context=200)
        cache = long.new_cache()
        long.step([1] * 150, cache)
        for call in (
            lambda: short.step([1], cache),
            lambda: short.step_each([1], [cache]),
            lambda: short.step_each([1], [None]),
        ):
            with pytest.raises(UsageError, match="not of this engine"):
                call()
        assert cache.length == 150

    def test_calls_from_several_threads(self, irq_file: Path) -> None:
        engine = Engine(irq_file)
        expected = engine.logits([1, 2, 3])
        wrong: list[int] = []

        def work(index: int) -> None:
            wrong.extend(index for _ in range(20) if not np.array_equal(engine.logits([1, 2, 3]), expected))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_sequence_outlives_the_name_of_its_engine(self, irq_file: Path) -> None:
        session = Engine(irq_file).session()
        assert session.next_logits([1, 2]).shape == (259,)


def greedy(start: Callable[[], object], prompt: list[int], count: int) -> list[int]:
    return list(generate(start(), prompt, SamplingParams(max_tokens=count)))


def test_greedy_equals_the_reference(irq_file: Path) -> None:
    prompt = [1, 2, 3]
    expected = greedy(load_model(irq_file).session, prompt, 200)
    assert greedy(Engine(irq_file).session, prompt, 200) == expected
    assert len(set(expected)) > 5


@pytest.fixture(scope="module")
def sound_parts() -> tuple[dict[str, GgufValue], list[TensorSource]]:
    blocks = block_tensors(tiny_model(), BlockSpec("nf4"))
    layer = random_layer((128, 128), 10.0, np.random.default_rng(0))
    return irq_parts(tiny_model(), blocks, {"model.layers.0.self_attn.q_proj": layer})


@pytest.mark.parametrize("vandalism", [*CASES.values(), None], ids=[*CASES, "sound"])
def test_malformed_irq_payload(
    vandalism: Callable[[Parts], object] | None,
    sound_parts: tuple[dict[str, GgufValue], list[TensorSource]],
    tmp_path: Path,
) -> None:
    """What the Python check of irq files refuses, the engine refuses."""
    metadata, sources = sound_parts
    parts = Parts(dict(metadata), {tensor.name: tensor for tensor in sources})
    if vandalism is None:
        Engine(parts.write(tmp_path / "m.gguf"))
        return
    vandalism(parts)
    with pytest.raises((MalformedFile, UnsupportedModel, UsageError)):
        Engine(parts.write(tmp_path / "m.gguf"))
