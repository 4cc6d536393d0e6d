"""irq-export import: QLoRA models of bitsandbytes become checkpoints, bit for bit, and run as they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from irq_export.cli import main
from irq_export.export.gguf import to_gguf
from irq_export.export.onnx import to_onnx
from irq_export.importers.bitsandbytes import check_decoding
from irq_export.importers.run import ImportReport, import_checkpoint
from irq_export.parity.metrics import compare
from irq_export.parity.verify import verify
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import (
    IrqError,
    MalformedFile,
    OutputExists,
    ParityFailed,
    UnsupportedModel,
    UsageError,
)
from irq_formats.safetensors_io import open_sharded
from irq_runtime.engine import Engine
from tests.tiny_models import save_tiny_model, tiny_tokens
from tests.tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer
from tests.tolerance import NMSE_BITSANDBYTES

functional = pytest.importorskip("bitsandbytes.functional")

LINEARS = 14


@dataclass(frozen=True)
class Qlora:
    """A model that plain transformers, PEFT and bitsandbytes have quantised and adapted."""

    path: Path
    adapter: Path
    model: torch.nn.Module


def quantize_with_transformers(source: Path, path: Path, **options: object) -> PreTrainedModel:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=options.pop("dtype", torch.float32),
        quantization_config=BitsAndBytesConfig(**{**settings, **options}),
        device_map={"": "cpu"},
    )
    model.save_pretrained(path, max_shard_size="150KB")
    return model.eval()


def adapt(model: PreTrainedModel, path: Path) -> PeftModel:
    torch.manual_seed(5)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(path)
    return adapted.eval()


def make(folder: Path, *, tied: bool, dtype: torch.dtype, **options: object) -> Qlora:
    save_tiny_model(folder / "float", "llama", tied=tied, vocab_size=VOCAB_SIZE)
    path = folder / "bnb"
    model = quantize_with_transformers(folder / "float", path, dtype=dtype, **options)
    save_tiny_tokenizer(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "</s>"}))
    return Qlora(path, folder / "adapter", adapt(model, folder / "adapter"))


KINDS = {
    "double": {"tied": False, "dtype": torch.float32, "bnb_4bit_use_double_quant": True},
    "plain": {"tied": True, "dtype": torch.float16, "bnb_4bit_use_double_quant": False},
    "fsdp": {
        "tied": True,
        "dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Qlora]:
    made: dict[str, Qlora] = {}

    def get(kind: str) -> Qlora:
        if kind not in made:
            made[kind] = make(tmp_path_factory.mktemp(kind), **KINDS[kind])
        return made[kind]

    return get


@pytest.fixture(scope="module")
def imported(qlora: Callable[[str], Qlora], tmp_path_factory: pytest.TempPathFactory) -> ImportReport:
    source = qlora("double")
    return import_checkpoint(source.path, tmp_path_factory.mktemp("imported") / "out", adapter=source.adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_kept(qlora: Callable[[str], Qlora], kind: str, tmp_path: Path) -> None:
    """Against the file, read with safetensors' own reader, and bitsandbytes' own decoding."""
    source = qlora(kind)
    report = import_checkpoint(source.path, tmp_path / "out")
    assert (report.kind, report.modules, report.compared) == ("bitsandbytes", LINEARS, LINEARS)
    checkpoint = open_checkpoint(tmp_path / "out")
    tensors = {k: v for file in source.path.glob("*.safetensors") for k, v in load_file(file).items()}
    double = KINDS[kind]["bnb_4bit_use_double_quant"]
    for module in checkpoint.blocks:
        block, name = checkpoint.block_tensor(module), f"{module}.weight"
        state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        absmax = state["absmax"].numpy().reshape(-1)
        np.testing.assert_array_equal(block.parts["scale"].reshape(-1), absmax)
        assert block.parts["scale"].dtype == (np.uint8 if double else np.float32)
        assert block.spec.tau == "none"
        if double:
            np.testing.assert_array_equal(block.parts["scale_absmax"], state["nested_absmax"].numpy())
        quant_state = functional.QuantState.from_dict(state, torch.device("cpu"))
        packed = tensors[name].view(torch.uint8).reshape(-1, 1)
        high_first = torch.stack([packed >> 4, packed & 15], -1).reshape(block.shape)
        np.testing.assert_array_equal(block.codes(), high_first.numpy())
        quant_state.dtype = torch.float32
        decoded = functional.dequantize_4bit(packed, quant_state)
        np.testing.assert_array_equal(block.dequantize(), decoded.numpy())
    for name in checkpoint.plain:
        np.testing.assert_array_equal(
            checkpoint.plain_raw(name).view(np.uint8).reshape(-1),
            tensors[name].contiguous().view(torch.uint8).numpy().reshape(-1),
        )
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "bitsandbytes" not in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]


def trained_forward(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Logits by the path of training: weights decoded, then float32 products.

    Inputs that need a gradient keep bitsandbytes off its kernel for inference, which on CPUs with AVX512-BF16
    rounds activations and weights to bfloat16.
    """
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits: np.ndarray = model(inputs_embeds=embedded).logits[0].detach().float().numpy()
    return logits


def test_what_runs_is_what_transformers_runs(
    qlora: Callable[[str], Qlora], imported: ImportReport, tmp_path: Path
) -> None:
    """transformers' own bitsandbytes forward with PEFT's adapter, against the exported file."""
    source = qlora("double")
    to_gguf(imported.output, tmp_path / "m.gguf")
    tokens = tiny_tokens(source.model, 48)
    got = Engine(tmp_path / "m.gguf", threads=1).logits(tokens[0].tolist())
    expected = trained_forward(source.model, tokens)
    assert compare(expected, got, tokens[0].numpy()).nmse <= NMSE_BITSANDBYTES
    with source.model.disable_adapter():
        bare = trained_forward(source.model, tokens)
    assert compare(bare, got, tokens[0].numpy()).nmse > 1e-3  # the adapter is in it


def test_verify_is_green(imported: ImportReport, tmp_path: Path) -> None:
    to_gguf(imported.output, tmp_path / "m.gguf")
    options = {"runtimes": ["reference", "native"], "positions": 24, "greedy": 4}
    report = verify(tmp_path / "m.gguf", against=imported.output, **options)
    assert report.passed, report.to_text()


def test_it_becomes_onnx_too(imported: ImportReport, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    to_onnx(imported.output, tmp_path / "onnx")
    options = {"runtimes": ["onnxruntime"], "positions": 24, "greedy": 4}
    report = verify(tmp_path / "onnx", against=imported.output, **options)
    assert report.passed, report.to_text()


def test_the_adapter_belongs_to_the_new_base(imported: ImportReport) -> None:
    from irq_formats.peft_adapter import read_peft_adapter

    checkpoint = open_checkpoint(imported.output)
    assert checkpoint.adapter_dir is not None
    adapter = read_peft_adapter(checkpoint.adapter_dir)
    assert adapter.base_hash == checkpoint.base_hash == imported.base_hash
    assert imported.adapter == len(adapter.layers) == LINEARS
    assert next(iter(adapter.layers.values())).scaling == 2


def test_command_line(qlora: Callable[[str], Qlora], tmp_path: Path) -> None:
    arguments = ["import", str(qlora("double").path), "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["import"]["compared"] == LINEARS
    assert CliRunner().invoke(main, arguments).exit_code == OutputExists.exit_code


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a bitsandbytes directory as one changed file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def state_edit(**values: object) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = f"{Q}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist()))
        tensors[key] = torch.tensor(list(json.dumps({**state, **values}).encode()), dtype=torch.uint8)

    return change


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


Q = "model.layers.0.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], type[IrqError], str]] = {
    "fp4": (
        rename(f"{Q}.quant_state.bitsandbytes__nf4", f"{Q}.quant_state.bitsandbytes__fp4"),
        UnsupportedModel,
        "FP4",
    ),
    "block size": (state_edit(blocksize=128), UnsupportedModel, "64 or 32"),
    "second level": (state_edit(nested_blocksize=128), UnsupportedModel, "second-level"),
    "shape": (state_edit(shape=[64, 256]), MalformedFile, "shape in the state"),
    "offset": (state_edit(nested_offset="x"), MalformedFile, "nested_offset"),
    "map": (replaced(f"{Q}.quant_map", lambda t: t * 1.0001), UnsupportedModel, "quant_map"),
    "nested map": (
        replaced(f"{Q}.nested_quant_map", lambda t: t.flip(0)),
        UnsupportedModel,
        "nested_quant_map",
    ),
    "no absmax": (lambda tensors: tensors.pop(f"{Q}.absmax"), MalformedFile, "tensors of the state"),
    "short": (replaced(Q, lambda t: t[:-1]), MalformedFile, "packed codes"),
    "not finite": (replaced(f"{Q}.nested_absmax", lambda t: t / 0), MalformedFile, "finite"),
    "one more": (lambda tensors: tensors.update(x=torch.zeros(1)), MalformedFile, "does not have"),
    "one less": (lambda tensors: tensors.pop("model.norm.weight"), MalformedFile, "missing"),
    "quantised head": (
        lambda tensors: tensors.update({"lm_head.weight.absmax": torch.zeros(1)}),
        UnsupportedModel,
        "not a linear",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_refused(how: str, qlora: Callable[[str], Qlora], tmp_path: Path) -> None:
    change, error, message = REFUSED[how]
    shutil.copytree(qlora("double").path, tmp_path / "bnb")
    edit(tmp_path / "bnb", change)
    with pytest.raises(error, match=message):
        import_checkpoint(tmp_path / "bnb", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bnb"]


CONFIGS = [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "LLM.int8"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "FP4"),
    ({"quant_method": "gptq", "bits": 4}, "no importer"),
]


@pytest.mark.parametrize(("quantization", "message"), CONFIGS)
def test_refused_by_name(
    quantization: dict[str, object], message: str, qlora: Callable[[str], Qlora], tmp_path: Path
) -> None:
    shutil.copytree(qlora("double").path, tmp_path / "bnb")
    config = json.loads((tmp_path / "bnb/config.json").read_text())
    (tmp_path / "bnb/config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UnsupportedModel, match=message):
        import_checkpoint(tmp_path / "bnb", tmp_path / "out")


def test_unsloth_leaves_a_tied_head_in_the_file(qlora: Callable[[str], Qlora], tmp_path: Path) -> None:
    shutil.copytree(qlora("plain").path, tmp_path / "bnb")
    edit(
        tmp_path / "bnb",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    report = import_checkpoint(tmp_path / "bnb", tmp_path / "out")
    assert "tied" in report.skipped["lm_head.weight"]
    edit(tmp_path / "bnb", replaced("lm_head.weight", lambda t: t + 1))
    with pytest.raises(UnsupportedModel, match="differs from the embedding"):
        import_checkpoint(tmp_path / "bnb", tmp_path / "other")


def test_a_wrong_decoding_is_found(qlora: Callable[[str], Qlora], imported: ImportReport) -> None:
    """The comparison after writing would notice nibbles in the wrong order."""
    source = open_sharded(qlora("double").path)
    module = Q.removesuffix(".weight")
    tensor = open_checkpoint(imported.output).block_tensor(module)
    check_decoding(source, module, tensor)
    swapped = tensor.parts["codes"].view(np.uint8)
    tensor.parts["codes"] = (swapped << 4) | (swapped >> 4)  # type: ignore[index]
    with pytest.raises(ParityFailed):
        check_decoding(source, module, tensor)


def test_an_adapter_of_another_model_is_refused(qlora: Callable[[str], Qlora], tmp_path: Path) -> None:
    shutil.copytree(qlora("double").adapter, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "down_proj.lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :64].contiguous()}, weights)
    with pytest.raises(MalformedFile, match="does not fit"):
        import_checkpoint(qlora("double").path, tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [({"pooling": "mean"}, "has a pooling"), ({"device": "cpu"}, "nothing is searched")],
)
def test_options_of_other_sources_are_refused(
    option: dict[str, str], message: str, qlora: Callable[[str], Qlora], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        import_checkpoint(qlora("double").path, tmp_path / "out", **option)


def test_in_place_is_refused(qlora: Callable[[str], Qlora]) -> None:
    path = qlora("double").path
    with pytest.raises(UsageError, match="same directory"):
        import_checkpoint(path, path, overwrite=True)
