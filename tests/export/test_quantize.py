"""quantize: what is quantised, what is left alone, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_models import save_tiny_model, tiny_tokens

from irq_export.cli.quantize import command
from irq_export.icq import SearchConfig, quantize_tensor
from irq_export.quantize_model import QuantizeReport, quantize
from irq_export.quantizer import load_model
from irq_formats.blocks import BlockSpec, encode_int8
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import IrqError, MalformedFile, OutputExists, UnsupportedModel, UsageError
from irq_formats.safetensors_io import open_safetensors, write_safetensors

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with tokenizer files."""
    path = tmp_path_factory.mktemp("quantize") / "model"
    save_tiny_model(path, dtype=torch.bfloat16)
    (path / "tokenizer.json").write_text('{"é": 1}\r\n', encoding="utf-8")
    (path / "chat_template.jinja").write_bytes(b"{{ x }}\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_bytes(b"{{ y }}\n")
    (path / "tokenizer_code.py").write_text("raise SystemExit")
    return path


@pytest.fixture(scope="module")
def result(source: Path) -> QuantizeReport:
    return quantize(source, source.parent / "out", icq=True)


@pytest.fixture
def broken(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a model."""
    from safetensors.torch import save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_blocks_are_those_of_the_search(source: Path, result: QuantizeReport) -> None:
    checkpoint = open_checkpoint(result.output)
    weights = load_file(source / "model.safetensors")
    assert len(checkpoint.blocks) == 14
    for name in checkpoint.blocks:
        expected = quantize_tensor(weights[f"{name}.weight"], BlockSpec(), SearchConfig())
        for part, array in checkpoint.block_tensor(name).parts.items():
            assert array.tobytes() == expected.block.parts[part].tobytes()
        report = next(tensor for tensor in result.tensors if tensor.name == name)
        assert (
            report.entropy_before == expected.entropy_before < report.entropy_after == expected.entropy_after
        )
        assert report.rel_mse == expected.rel_mse
        assert report.bits_per_weight == expected.block.bits_per_weight


def test_everything_else_keeps_its_bits(source: Path, result: QuantizeReport) -> None:
    checkpoint = open_checkpoint(result.output)
    before = open_safetensors(source / "model.safetensors")
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= checkpoint.plain.keys()
    for name, ref in checkpoint.plain.items():
        assert ref.dtype == before.tensors[name].dtype == "BF16"
        assert checkpoint.plain_raw(name).tobytes() == before.read(name).tobytes()
    rag = "additional_chat_templates/rag.jinja"
    for name in ("tokenizer.json", "chat_template.jinja", rag, "generation_config.json"):
        assert (result.output / name).read_bytes() == (source / name).read_bytes()
    assert not (result.output / "tokenizer_code.py").exists()
    config = json.loads((source / "config.json").read_text())
    assert {k: v for k, v in checkpoint.config.items() if k != "quantization_config"} == config
    assert checkpoint.quantization.search == SearchConfig().to_dict()
    assert checkpoint.base_hash == result.base_hash


def test_bits_per_weight_of_a_real_layer(tmp_path: Path) -> None:
    save_tiny_model(
        tmp_path / "m",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=8,
        head_dim=64,
    )
    assert quantize(tmp_path / "m", tmp_path / "o", icq=False).bits_per_weight() <= 4.26


@pytest.mark.parametrize(
    ("settings", "spec", "search"),
    [
        ({"codebook": "int3", "block_size": 32, "scale": "f16", "tau": "f16"},
         BlockSpec("int3", 32, "f16", "f16"), SearchConfig()),
        ({"codebook": "nf2", "refine": "none", "tie": "first", "objective": "entropy"},
         BlockSpec("nf2"), SearchConfig(refine="none", tie="first")),
        ({"icq": False, "refine": "none", "numerics": "reference", "tau": "none", "scale_rounding": "none"},
         BlockSpec("nf4", 64, "dq8", "none", "none"), SearchConfig.released(icq=False)),
    ],
)  # fmt: skip
def test_settings_reach_the_search(
    source: Path, tmp_path: Path, settings: dict[str, Any], spec: BlockSpec, search: SearchConfig
) -> None:
    quantize(source, tmp_path / "o", include=[Q], **settings)
    checkpoint = open_checkpoint(tmp_path / "o")
    weight = load_file(source / "model.safetensors")[f"{Q}.weight"]
    expected = quantize_tensor(weight, spec, search).block
    assert list(checkpoint.blocks) == [Q]
    assert checkpoint.block_tensor(Q).parts["codes"].tobytes() == expected.parts["codes"].tobytes()
    assert checkpoint.block_tensor(Q).spec == expected.spec


@pytest.mark.parametrize(
    ("options", "searched"),
    [
        ("--codebook nf4", False),
        ("--codebook nf4 --icq", True),
        ("--codebook nf4 --tie first", True),
        ("--codebook nf4 --objective mse", True),
        ("--codebook nf3", True),
        ("--codebook nf2", True),
        ("--codebook int4", True),
        ("--codebook int4 --no-icq", False),
    ],
)
def test_nf4_alone_is_not_searched_by_default(
    source: Path, tmp_path: Path, options: str, searched: bool
) -> None:
    """What docs/paper.md supports; where somebody says how to search, the search runs."""
    done = run(source, "-o", tmp_path / "o", "--include", Q, *options.split())
    assert done.exit_code == 0, done.output
    search = open_checkpoint(tmp_path / "o").quantization.search
    assert search["icq"] is searched
    assert search["refine"] == "ls"


@pytest.mark.parametrize("tied", [False, True])
def test_int8_embedding(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "m", tied=tied)
    monkeypatch.setattr("irq_export.quantize_model._CHUNK_BYTES", 5000)  # several chunks of rows
    quantize(tmp_path / "m", tmp_path / "o", embedding="int8", include=[Q])
    checkpoint = open_checkpoint(tmp_path / "o")
    assert set(checkpoint.blocks) == {Q, "model.embed_tokens"} | (set() if tied else {"lm_head"})
    weight = load_file(tmp_path / "m" / "model.safetensors")["model.embed_tokens.weight"].numpy()
    expected = encode_int8(weight)
    for part, array in checkpoint.block_tensor("model.embed_tokens").parts.items():
        assert array.tobytes() == expected.parts[part].tobytes()


def test_sharded_source_gives_the_same_checkpoint(
    source: Path, result: QuantizeReport, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert quantize(tmp_path / "m", tmp_path / "o", icq=True).base_hash == result.base_hash


def test_stories260k(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "models/stories260k-fp32/hf"
    report = quantize(path, tmp_path / "o")
    assert len(report.tensors) == 30
    assert set(report.skipped) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(5)}
    assert all("172 inputs" in reason for reason in report.skipped.values())
    assert open_checkpoint(tmp_path / "o").quantization.skipped == report.skipped
    assert (tmp_path / "o" / "tokenizer.model").read_bytes() == (path / "tokenizer.model").read_bytes()
    model = load_model(tmp_path / "o", dtype=torch.float64)
    before = load_model_f64(path)
    tokens = tiny_tokens(model)
    with torch.no_grad():
        agreement = (model(tokens).logits.argmax(-1) == before(tokens).logits.argmax(-1)).double().mean()
    assert agreement > 0.5  # it is still the same model


def load_model_f64(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def test_include_and_exclude(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "o", include=["*.mlp.*"], exclude=["model.layers.1.*"])
    names = {tensor.name for tensor in report.tensors}
    assert names == {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert report.skipped["model.layers.1.mlp.up_proj.weight"] == "excluded by model.layers.1.*"
    assert report.skipped[f"{Q}.weight"] == "not included"
    with pytest.raises(UsageError, match="matches no linear"):
        quantize(source, tmp_path / "p", exclude=["lm_hed"])


def test_existing_output(source: Path, result: QuantizeReport, tmp_path: Path) -> None:
    with pytest.raises(OutputExists):
        quantize(source, result.output)
    with pytest.raises(UsageError, match="same directory"):
        quantize(source, source, overwrite=True)
    shutil.copytree(result.output, tmp_path / "o")
    quantize(source, tmp_path / "o", include=[Q], overwrite=True)
    assert list(open_checkpoint(tmp_path / "o").blocks) == [Q]


def _poke(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(3, value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_poke(f"{Q}.weight", float("nan")), UnsupportedModel, "finite"),
        (_poke("model.embed_tokens.weight", float("inf")), UnsupportedModel, "finite"),
        (_poke("model.norm.weight", -float("inf")), UnsupportedModel, "finite"),
        (lambda t: t.pop(f"{Q}.weight"), MalformedFile, "missing"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(128, 64)}), MalformedFile, "shape"),
        (
            lambda t: t.update({f"{Q}.weight": torch.zeros(128, 128, dtype=torch.int8)}),
            UnsupportedModel,
            "I8",
        ),
        (lambda t: t.update(other=torch.zeros(1)), UnsupportedModel, "does not have"),
    ],
)
def test_weights_that_are_refused(
    broken: Path, change: Callable[[dict[str, torch.Tensor]], object], error: type[IrqError], message: str
) -> None:
    rewrite(broken, change)
    with pytest.raises(error, match=message):
        quantize(broken, broken.parent / "o", icq=False)
    assert [path.name for path in broken.parent.iterdir()] == ["model"]


def test_old_llama_extras_are_left_out_with_a_reason(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "m", tied=True)
    embedding = model.model.embed_tokens.weight.detach()
    rewrite(tmp_path / "m", lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16), "lm_head.weight": embedding.clone()
    }))  # fmt: skip
    report = quantize(tmp_path / "m", tmp_path / "o", include=[Q])
    assert "rope_theta" in report.skipped["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "tied" in report.skipped["lm_head.weight"]
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(UnsupportedModel, match="tied"):
        quantize(tmp_path / "m", tmp_path / "p")


def test_pickled_weights_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        quantize(broken, broken.parent / "o")


def test_quantised_models_are_refused(result: QuantizeReport, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="already"):
        quantize(result.output, tmp_path / "o")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_the_index_may_not_leave_the_directory(broken: Path, shard: str) -> None:
    names = open_safetensors(broken / "model.safetensors").tensors
    (broken / "model.safetensors").rename(broken.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MalformedFile, match="plain file name"):
        quantize(broken, broken.parent / "o")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_command_line(source: Path, tmp_path: Path, result: QuantizeReport) -> None:
    done = run(source, "-o", tmp_path / "o", "--icq", "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["quantize"]["base_hash"] == result.base_hash
    assert len(document["quantize"]["tensors"]) == 14
    assert run(source, "-o", tmp_path / "o").exit_code == 6
    again = run(source, "-o", tmp_path / "o", "--force", "--include", Q)
    assert again.exit_code == 0
    assert "nf4: 1 tensors" in again.stdout
    assert "not quantised: lm_head" not in again.stdout
    assert run(source, "-o", tmp_path / "p", "--device", "abacus").exit_code == 2
    assert run(tmp_path / "none", "-o", tmp_path / "p").exit_code == 2
    assert run(source, "-o", tmp_path / "p", "--numerics", "reference").exit_code == 2
    assert run(source).exit_code == 2


def test_dry_run_writes_nothing_and_knows_the_size(
    source: Path, tmp_path: Path, result: QuantizeReport
) -> None:
    done = run(source, "--dry-run", "--json")
    plan = json.loads(done.stdout)["plan"]
    written = open_safetensors(result.output / "model.safetensors").tensors.values()
    assert plan["output_bytes"] == sum(ref.nbytes for ref in written)
    assert run(source, "--dry-run", "-o", tmp_path / "o").exit_code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--icq", "--tau", "none"], ["--numerics", "reference"]])
def test_contradictions_are_told_in_the_terms_of_the_command_line(
    source: Path, tmp_path: Path, options: list[str]
) -> None:
    """By the dry run too, and before a weight is read."""
    for place in (["--dry-run"], ["-o", tmp_path / "o"]):
        done = run(source, *place, *options)
        assert done.exit_code == 2
        assert "model.layers" not in done.stderr
        assert "SearchConfig" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_in_the_old_checkpoint_is_not_deleted(source: Path, tmp_path: Path) -> None:
    """--force replaces what quantize wrote, not a night of training beside it."""
    assert run(source, "-o", tmp_path / "new" / "o", "--include", Q).exit_code == 0
    (tmp_path / "new" / "o" / "adapter").mkdir()
    (tmp_path / "new" / "o" / "adapter" / "adapter_model.safetensors").write_bytes(b"trained")
    done = run(source, "-o", tmp_path / "new" / "o", "--force", "--include", Q)
    assert done.exit_code == 6
    assert "adapter/adapter_model.safetensors" in done.stderr.replace("\n", "")
    assert (tmp_path / "new" / "o" / "adapter" / "adapter_model.safetensors").read_bytes() == b"trained"


_MEASURE = """
import pathlib, re, sys
import irq_export.quantize_model
def peak_bytes():  # of this program; ru_maxrss would remember the parent's
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
before = peak_bytes()
one = ["*.0.mlp.down_proj"]
irq_export.quantize_model.quantize(sys.argv[1], sys.argv[2], include=one, icq=False, refine="none")
print(before, peak_bytes())
"""


def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:
    """One model of 230 MB whose largest tensor has 19 MB: reading it whole, or keeping it, would show."""
    hidden, inner, layers, vocab = 512, 9216, 4, 259
    rng = np.random.default_rng(0)
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    from irq_formats.checkpoint import hf_tensor_shapes
    from irq_formats.model import ModelConfig

    shapes = hf_tensor_shapes(ModelConfig.from_hf(config))
    block = rng.standard_normal(inner * hidden, dtype=np.float32)
    tensors = {name: block[: np.prod(shape)].reshape(shape) for name, shape in shapes.items()}
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors)
    total_bytes = sum(array.nbytes for array in tensors.values())
    largest_bytes = max(array.nbytes for array in tensors.values())
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "m"), str(tmp_path / "o")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak = map(int, measured.stdout.split())
    # Temporaries of fixed size: 32 MiB of search, 32 MiB of rows read, a few 2-MiB pieces in float64, and
    # what the allocator keeps; measured 60 to 95 MiB. The model would add 230.
    assert peak - before < largest_bytes + (128 << 20) < 0.7 * total_bytes
    assert peak < largest_bytes + (1 << 30)
