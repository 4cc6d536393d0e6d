"""Training in other people's words: from_pretrained, PEFT, Trainer, TRL."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_checkpoints import write_tiny_checkpoint
from tiny_models import save_tiny_model
from tiny_tokenizers import save_tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from irq_export.block_modules import BlockModule, IrqTiedHead
from irq_export.iec import attach
from irq_export.peft_iec import IrqLoraConfig
from irq_export.quantize_loaded import save_checkpoint
from irq_export.quantize_model import quantize
from irq_export.quantizer import IrqConfig, load_model
from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import IrqError, MalformedFile, UnsupportedModel, UsageError, WrongBase
from irq_formats.hf_tokenizer import chat_templates
from irq_formats.peft_adapter import read_peft_adapter, write_peft_adapter

TOKENS = torch.arange(24).reshape(1, 24) * 7 % 259


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "base"
    write_tiny_checkpoint(path, tied=True, embedding=True)
    return path


def adapted(base: Path, **settings: Any) -> PeftModel:
    """A model with an adapter that training could have left: nothing in it is zero."""
    model = get_peft_model(load_model(base), IrqLoraConfig(r=8, lora_alpha=16, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.normal_(std=0.05, generator=generator)
    return model.eval()


def tokenizer_in(directory: Path) -> Any:
    save_tiny_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "</s>"}))
    return AutoTokenizer.from_pretrained(str(directory))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(("tied", "codebook"), [(True, "nf3"), (False, "nf4")])
def test_quantising_on_load_is_quantising(tied: bool, codebook: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "float", tied=tied, intermediate_size=200)  # down_proj stays as it is
    report = quantize(tmp_path / "float", tmp_path / "base", codebook=codebook, embedding="int8")
    wish = IrqConfig(codebook=codebook, embedding="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=wish)
    assert model.config.quantization_config.base_hash == report.base_hash
    assert isinstance(model.lm_head, IrqTiedHead) == tied
    assert torch.equal(logits(model), logits(load_model(tmp_path / "base")))
    written = save_checkpoint(get_peft_model(model, IrqLoraConfig(r=4)), tmp_path / "saved")
    assert written.base_hash == open_checkpoint(tmp_path / "saved").base_hash == report.base_hash
    assert written.skipped.keys() == report.skipped.keys()


def test_named_chat_templates_are_saved(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    tokenizer = tokenizer_in(tmp_path / "tokenizer")
    tokenizer.chat_template = {"default": "A", "rag": "B"}
    save_checkpoint(load_model(checkpoint), tmp_path / "saved", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == tokenizer.chat_template
    assert chat_templates(tmp_path / "saved") == tokenizer.chat_template


def test_wishes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for values in ({"codebok": "nf4"}, {"codebook": "int8"}, {"icq": True, "tau": "none"}):
        with pytest.raises(IrqError):
            IrqConfig(**values)
    save_tiny_model(tmp_path / "float")
    wish = IrqConfig(exclude=["*.nothing"])
    with pytest.raises(UsageError, match="matches no linear"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=wish)


def test_a_model_that_was_cast_is_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="changed since it was loaded"):
        save_checkpoint(load_model(checkpoint).to(torch.bfloat16), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("iec", [True, False])
def test_peft_keeps_the_betas_and_the_base(iec: bool, checkpoint: Path, tmp_path: Path) -> None:
    model = adapted(checkpoint, irq_iec=iec)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_peft_adapter(tmp_path / "adapter")
    base_hash = open_checkpoint(checkpoint).base_hash
    assert (len(adapter.layers), adapter.has_iec, adapter.base_hash) == (14, iec, base_hash)
    again = PeftModel.from_pretrained(load_model(checkpoint), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(again.eval()), expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    ours = load_model(checkpoint)
    attach(ours, adapter)
    assert torch.allclose(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(load_model(checkpoint)), expected, rtol=1e-2, atol=1e-2)
    write_peft_adapter(tmp_path / "written", adapter)  # our writer's form reads back through PEFT too
    again = PeftModel.from_pretrained(load_model(checkpoint), tmp_path / "written")
    assert again.peft_config["default"].irq_base_hash == base_hash
    assert torch.equal(logits(again.eval()), expected)


def test_two_adapters_switch_and_disable(checkpoint: Path, tmp_path: Path) -> None:
    model = adapted(checkpoint)
    first = logits(model)
    model.save_pretrained(tmp_path / "a")
    model.load_adapter(tmp_path / "a", "other")
    model.add_adapter("plain", IrqLoraConfig(r=4, irq_iec=False))
    model.set_adapter("other")
    assert torch.equal(logits(model), first)
    model.set_adapter("plain")  # B is zero
    base = logits(load_model(checkpoint))
    assert torch.equal(logits(model), base)
    model.set_adapter("default")
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.delete_adapter("other")
    assert not any("other" in name for name, _ in model.named_parameters())


def test_an_adapter_of_another_base_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    adapted(checkpoint).save_pretrained(tmp_path / "adapter")
    write_tiny_checkpoint(tmp_path / "other", BlockSpec("int4"), tied=True, embedding=True)
    with pytest.raises(WrongBase, match="another quantised base"):
        PeftModel.from_pretrained(load_model(tmp_path / "other"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    written = tmp_path / "written"
    write_peft_adapter(written, read_peft_adapter(tmp_path / "adapter"))
    (written / "adapter_config.json").write_text(json.dumps({**config, "irq_base_hash": "0" * 64}))
    with pytest.raises(MalformedFile, match="different bases"):
        read_peft_adapter(written)


def test_merging_is_refused_with_the_reason(checkpoint: Path) -> None:
    model = adapted(checkpoint)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UsageError, match="not merged into a quantised base"):
            merge()


def perturb(model: torch.nn.Module, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name:
                parameter.normal_(std=0.5 if "beta" in name else 0.05, generator=generator)


def test_combined_adapters_keep_their_elastic_connections(checkpoint: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(checkpoint), IrqLoraConfig(r=4, lora_alpha=8)).eval()
    model.add_adapter("other", IrqLoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "o_proj"]))
    for seed, name in enumerate(("default", "other")):
        perturb(model, name, seed)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "twin", combination_type="linear")
    model.set_adapter("twin")
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["twin"])
    ours = load_model(checkpoint)
    attach(ours, read_peft_adapter(tmp_path / "twin"))
    assert torch.allclose(logits(ours), expected, rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], kind, kind, svd_rank=16)
        model.set_adapter(kind)
        assert torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-4), kind
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


REFUSED = {
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1]},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ".*(q_proj|embed_tokens)"},
}


@pytest.mark.parametrize("settings", REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("iec", [True, False])
def test_what_no_exporter_knows_is_not_trained(settings: dict[str, Any], iec: bool, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "base", tied=False, embedding=False)
    with pytest.raises((UnsupportedModel, UsageError)) as refusal:
        get_peft_model(load_model(tmp_path / "base"), IrqLoraConfig(r=4, irq_iec=iec, **settings))
    assert next(iter(settings)).split("_")[0] in str(refusal.value)


def test_other_models_and_adapters_are_left_alone(tmp_path: Path) -> None:
    """Our tuner stands in PEFT's table for every LoRA of the process."""
    save_tiny_model(tmp_path / "float", tied=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(r=4, **settings)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert not torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float")))


def test_stock_lora_says_what_is_missing(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="IrqLinear"):
        get_peft_model(load_model(checkpoint), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_through_peft_are_those_of_our_module(
    checkpointing: bool, checkpoint: Path, tmp_path: Path
) -> None:
    model = adapted(checkpoint).train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model(TOKENS, labels=TOKENS).loss.backward()
    model.save_pretrained(tmp_path / "adapter")
    ours = load_model(checkpoint)
    attach(ours, read_peft_adapter(tmp_path / "adapter"))
    ours.train()
    ours(TOKENS, labels=TOKENS).loss.backward()
    for name, module in ours.named_modules():
        if hasattr(module, "beta1"):
            layer = model.get_submodule(f"base_model.model.{name}")
            for theirs, mine in (
                (layer.lora_beta1["default"], module.beta1),
                (layer.lora_beta2["default"], module.beta2),
                (layer.lora_A["default"].weight, module.lora_a),
                (layer.lora_B["default"].weight, module.lora_b),
            ):
                assert theirs.grad is not None
                assert mine.grad.abs().max() > 0
                assert torch.allclose(theirs.grad, mine.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_trl_trains_it_and_the_result_deploys(tied: bool, tmp_path: Path) -> None:
    """SFTTrainer puts our configuration on the model, trains it in bf16 and saves what exporters read.

    Its loss multiplies by the weight of the head, which is int8: the embedding, or a matrix of its own.
    """
    checkpoint = tmp_path / "base"
    write_tiny_checkpoint(checkpoint, tied=tied, embedding=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        tokens = TOKENS[0].tolist()
        rows = datasets.Dataset.from_dict({"input_ids": [tokens[i : i + 16] for i in range(8)]})
        args = trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        model: PreTrainedModel = load_model(checkpoint, dtype=torch.bfloat16)
        trainer = trl.SFTTrainer(
            model,
            args=args,
            train_dataset=rows,
            peft_config=IrqLoraConfig(r=8, lora_alpha=16),
            processing_class=tokenizer_in(tmp_path),
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
    adapter = read_peft_adapter(tmp_path / "adapter")
    assert adapter.base_hash == open_checkpoint(checkpoint).base_hash
    assert all(layer.beta1 != 0 and layer.beta2 != 0 for layer in adapter.layers.values())
    assert any(isinstance(module, BlockModule) for module in trainer.model.modules())
