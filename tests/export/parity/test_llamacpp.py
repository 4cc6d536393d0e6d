"""Stock llama.cpp against transformers on a tiny random llama, F32 weights and F32 adapter."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerance import LLAMACPP_FORCED_LOGPROB, NMSE_FLOAT32

from irq_export.parity.llamacpp import LlamaCpp
from irq_formats.errors import IrqError, UnsupportedModel, UsageError

pytest.importorskip("xllamacpp")

RANK = 4
CTX = 64
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
VOCAB = len(SPECIAL) + len(BYTES)  # 259, as tiny_model has it


@dataclass(frozen=True)
class TinyLlama:
    """A random model in torch and the same numbers as base and adapter GGUF."""

    base: Path
    adapter: Path
    plain: torch.nn.Module
    adapted: torch.nn.Module


def gguf_name(name: str) -> str:
    """The name that the `gguf` package gives to a tensor: independent of irq_formats.names."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(name)


def permute_rows(weight: np.ndarray, name: str, config: object) -> np.ndarray:
    """Rows of q and k: from halves to llama.cpp's neighbouring pairs."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if kind not in heads:
        return weight
    rows, columns = weight.shape
    halves = weight.reshape(heads[kind], 2, rows // heads[kind] // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def finish(writer: object) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_base(path: Path, model: torch.nn.Module) -> None:
    config, kinds = model.config, gguf.TokenType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CTX)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*SPECIAL, *BYTES])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * len(BYTES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
    for name, weight in model.named_parameters():  # the tied head is not among them
        target = gguf_name(name.removesuffix(".weight"))
        writer.add_tensor(
            f"{target}.weight", permute_rows(weight.detach().numpy(), f"{target}.weight", config)
        )
    finish(writer)


def write_adapter(path: Path, model: torch.nn.Module) -> None:
    """Random A and B for every linear of `model` (float64), merged into it; written with alpha 0."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        rows, columns = module.weight.shape
        lora_a = rng.normal(0, columns**-0.5, (RANK, columns)).astype(np.float32)
        lora_b = rng.normal(0, 0.3, (rows, RANK)).astype(np.float32)
        module.weight.data += torch.from_numpy(lora_b.astype(np.float64) @ lora_a)
        target = f"{gguf_name(name)}.weight"
        writer.add_tensor(f"{target}.lora_a", lora_a)
        writer.add_tensor(f"{target}.lora_b", permute_rows(lora_b, target, model.config))
    finish(writer)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    directory = tmp_path_factory.mktemp("tiny")
    base, adapter = directory / "base.gguf", directory / "adapter.gguf"
    plain, adapted = tiny_model(tied=True), tiny_model(tied=True, dtype=torch.float64)
    write_base(base, plain)
    write_adapter(adapter, adapted)
    return TinyLlama(base, adapter, plain.double(), adapted)


@pytest.fixture(scope="module")
def llama(tiny: TinyLlama) -> Iterator[LlamaCpp]:
    with LlamaCpp(tiny.base, threads=1, ctx=CTX) as model:
        yield model


TOKENS = [1, *np.random.default_rng(2).integers(3, VOCAB, 31).tolist()]


def torch_logprobs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].log_softmax(-1).numpy()


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.mean((got - want) ** 2) / np.var(want))


def test_every_position_matches_torch(tiny: TinyLlama, llama: LlamaCpp) -> None:
    done: list[int] = []
    got = llama.logprobs(TOKENS, progress=done.append)
    assert (got.shape, got.dtype) == ((len(TOKENS), VOCAB), np.float32)
    assert nmse(got, torch_logprobs(tiny.plain)) <= NMSE_FLOAT32
    assert done == list(range(1, len(TOKENS) + 1))


def test_adapter_is_applied_with_its_scale(tiny: TinyLlama) -> None:
    plain, adapted = torch_logprobs(tiny.plain), torch_logprobs(tiny.adapted)
    with LlamaCpp(tiny.base, tiny.adapter, threads=1, ctx=CTX) as model:
        on = model.logprobs(TOKENS)
    with LlamaCpp(tiny.base, tiny.adapter, lora_scale=0.0, threads=1, ctx=CTX) as model:
        off = model.logprobs(TOKENS)
    assert nmse(on, adapted) <= NMSE_FLOAT32
    assert nmse(off, plain) <= NMSE_FLOAT32
    assert nmse(off, adapted) > 1e-2


def test_next_token_logprobs_agree_with_the_whole_distribution(llama: LlamaCpp) -> None:
    rows = llama.logprobs(TOKENS)
    chosen = rows[np.arange(len(TOKENS) - 1), TOKENS[1:]]
    got = llama.next_token_logprobs(TOKENS)
    np.testing.assert_allclose(got, chosen, rtol=0, atol=LLAMACPP_FORCED_LOGPROB)


def test_greedy_is_the_argmax_at_every_step(llama: LlamaCpp) -> None:
    generated = llama.greedy(TOKENS[:5], 12)
    assert len(generated) == 12
    rows = llama.logprobs(TOKENS[:5] + generated)
    assert generated == rows[4:-1].argmax(axis=1).tolist()


def test_a_prompt_does_not_depend_on_the_one_before(llama: LlamaCpp) -> None:
    first = llama.logprobs(TOKENS[:8])
    llama.logprobs(TOKENS[:4] + TOKENS[12:16])
    np.testing.assert_array_equal(llama.logprobs(TOKENS[:8]), first)


def test_tokenize(llama: LlamaCpp) -> None:
    ids = [len(SPECIAL) + byte for byte in "aé".encode()]
    assert llama.tokenize("aé") == [1, *ids]
    assert llama.tokenize("aé", add_special=False) == ids
    assert llama.tokenize("</s>", add_special=False) == [2]
    assert 2 not in llama.tokenize("</s>", add_special=False, parse_special=False)


@pytest.mark.parametrize("tokens", [[], [0] * (CTX + 1), [VOCAB], [-1]])
def test_sequences_that_cannot_be_evaluated(llama: LlamaCpp, tokens: list[int]) -> None:
    with pytest.raises(UsageError):
        llama.logprobs(tokens)


def test_the_whole_context_can_be_used(llama: LlamaCpp) -> None:
    assert len(llama.next_token_logprobs((TOKENS * 2)[:CTX])) == CTX - 1
    assert len(llama.greedy((TOKENS * 2)[: CTX - 3], 3)) <= 3


def test_a_file_that_llama_cpp_refuses(
    tiny: TinyLlama, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.base.read_bytes()[:2000])
    with pytest.raises(UnsupportedModel, match=r"broken\.gguf.*gguf"):
        LlamaCpp(broken)
    with pytest.raises(UnsupportedModel, match="adapter"):
        LlamaCpp(tiny.base, broken)
    with pytest.raises(UsageError, match="no such file"):
        LlamaCpp(tmp_path / "absent.gguf")
    assert capfd.readouterr() == ("", "")  # the native log is in the error, not on the terminal


def test_death_of_the_native_code_is_an_error_not_a_crash(tiny: TinyLlama) -> None:
    with LlamaCpp(tiny.base, threads=1, ctx=CTX) as model:
        os.kill(model._server.pid, signal.SIGILL)
        with pytest.raises(IrqError, match="killed by SIGILL"):
            model.logprobs(TOKENS)


def test_missing_wheel_is_named(tiny: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedModel, match=r"pip install irq-export\[llamacpp\]"):
        LlamaCpp(tiny.base)
