"""calibrate and quantize --importance: the file, the statistics, the refusals, and that it pays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, tiny_tokens
from tiny_tokenizers import save_tiny_tokenizer
from tokenizers import Tokenizer

import irq_export
from irq_export.calibrate import calibrate, input_importance, read_importance
from irq_export.cli import main
from irq_export.quantize_model import quantize
from irq_export.quantizer import load_model
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import (
    IrqError,
    MalformedFile,
    OutputExists,
    UnsupportedModel,
    UsageError,
    WrongBase,
)
from irq_formats.safetensors_io import write_safetensors

DEMO = Path(irq_export.__file__).parent / "demo_model"
STORY = (
    "Once upon a time there lived a little girl in a house at the foot of a mountain. Every morning she went "
    "into the forest to look for wood, and every evening she came home and told her grandfather what she had "
    'seen. One day she met an old man who said, "Who are you, and where are you going?" '
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, and a text beside it."""
    path = tmp_path_factory.mktemp("calibrate") / "model"
    save_tiny_model(path, vocab_size=400)
    save_tiny_tokenizer(path)
    (path.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


@pytest.fixture(scope="module")
def importance(source: Path) -> Path:
    path = source.parent / "importance.safetensors"
    calibrate(source, source.parent / "text.txt", path, windows=4, context=32)
    return path


def test_importance_is_the_mean_square_of_the_inputs() -> None:
    from tiny_models import tiny_model

    model = tiny_model()
    windows = torch.cat([tiny_tokens(model, 16, seed=seed) for seed in (1, 2)])
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        keep = seen.setdefault(name, [])
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0][0]))
    found, nats = input_importance(model, windows)
    with torch.no_grad():
        expected = sum(float(model(input_ids=w[None], labels=w[None]).loss) for w in windows) / 2
    assert nats == pytest.approx(expected, rel=1e-6)
    assert "lm_head" not in found
    assert len(found) == 7 * model.config.num_hidden_layers
    for name, inputs in seen.items():
        torch.testing.assert_close(found[name], torch.cat(inputs[:2]).square().mean(dim=0))


def test_checkpoint_records_the_text(source: Path, importance: Path) -> None:
    output = source.parent / "calibrated"
    quantize(source, output, importance=importance)
    record = json.loads((output / "config.json").read_text())["quantization_config"]["search"]
    assert record["importance"] is True
    assert record["tokens"] == 4 * 32
    plain = source.parent / "plain"
    quantize(source, plain)
    calibrated, other = open_checkpoint(output), open_checkpoint(plain)
    assert calibrated.base_hash != other.base_hash
    assert calibrated.blocks.keys() == other.blocks.keys()


def test_refusals(source: Path, importance: Path, tmp_path: Path) -> None:
    text = source.parent / "text.txt"
    with pytest.raises(OutputExists):
        calibrate(source, text, importance)
    with pytest.raises(UsageError, match="shorter"):
        calibrate(source, text, tmp_path / "x", context=100_000)
    with pytest.raises(UsageError, match="no such file"):
        calibrate(source, tmp_path / "none.txt", tmp_path / "x")
    for settings in ({"icq": False}, {"icq": True}, {"tie": "first"}, {"codebook": "nf2", "refine": "none"}):
        with pytest.raises(UsageError, match="nothing is searched"):
            quantize(source, tmp_path / "x", importance=importance, **settings)
    with pytest.raises(UsageError, match="offset"):
        quantize(source, tmp_path / "x", importance=importance, tau="none")
    write_safetensors(tmp_path / "other.safetensors", {"a": torch.ones(3).numpy()})
    with pytest.raises(MalformedFile, match="calibrate"):
        read_importance(tmp_path / "other.safetensors")
    with pytest.raises(WrongBase, match="not measured"):
        quantize(DEMO, tmp_path / "x", importance=importance, include=["*.3.*"])
    with pytest.raises(IrqError):
        read_importance(text)
    assert not list(tmp_path.glob("x*"))


def test_a_model_that_is_not_whole_is_refused(source: Path, tmp_path: Path) -> None:
    """transformers would run what is missing, or what it cannot read, as random weights."""
    text = source.parent / "text.txt"
    quantize(source, tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModel, match="quantised already"):
        calibrate(tmp_path / "checkpoint", text, tmp_path / "x", windows=2, context=16)
    copied = tmp_path / "model"
    shutil.copytree(source, copied)
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MalformedFile, match=r"1 weights are missing; got model.layers.0.mlp.up_proj"):
        calibrate(copied, text, tmp_path / "x", windows=2, context=16)
    with pytest.raises(UsageError, match="no such device"):
        calibrate(source, text, tmp_path / "x", windows=2, context=16, device="bogus")
    small = tmp_path / "small"
    save_tiny_model(small, vocab_size=40)
    shutil.copyfile(source / "tokenizer.json", small / "tokenizer.json")
    with pytest.raises(MalformedFile, match="tokens that the model does not have"):
        calibrate(small, text, tmp_path / "x", windows=2, context=16)
    assert not list(tmp_path.glob("x*"))


def test_tokenizers_neither_cut_nor_pad(source: Path, importance: Path, tmp_path: Path) -> None:
    """Many a hub model's tokenizer.json cuts at 512 tokens, or fills up to them."""
    copied = tmp_path / "model"
    shutil.copytree(source, copied)
    tokenizer = Tokenizer.from_file(str(copied / "tokenizer.json"))
    tokenizer.enable_truncation(40)
    tokenizer.enable_padding(length=4096)
    tokenizer.save(str(copied / "tokenizer.json"))
    report = calibrate(copied, source.parent / "text.txt", tmp_path / "i", windows=4, context=32)
    assert report.tokens == 4 * 32
    expected = read_importance(importance).moments
    for name, vector in read_importance(tmp_path / "i").moments.items():
        torch.testing.assert_close(vector, expected[name])


def test_importance_pays_on_a_trained_model(tmp_path: Path) -> None:
    """Two bits, the demo model, a text it was not calibrated on: the loss falls by half a nat and more."""
    (tmp_path / "text.txt").write_text(
        (DEMO.parent / "parity" / "corpus.txt").read_text("utf-8") * 2, "utf-8"
    )
    arguments = ["calibrate", str(DEMO), str(tmp_path / "text.txt"), "-o", str(tmp_path / "i")]
    result = CliRunner().invoke(main, [*arguments, "--windows", "8", "--context", "128", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["calibrate"]["layers"] == 28
    ids = torch.tensor([Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(STORY).ids])
    loss = {}
    for name, options in {"default": [], "importance": ["--importance", str(tmp_path / "i")]}.items():
        arguments = ["quantize", str(DEMO), "-o", str(tmp_path / name), "--codebook", "nf2", *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        with torch.inference_mode():
            loss[name] = float(load_model(tmp_path / name)(input_ids=ids, labels=ids).loss)
    assert loss["importance"] < loss["default"] - 0.5
