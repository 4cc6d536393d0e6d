"""One training run from settings to a directory that every exporter reads.

The loop is transformers' Trainer on accelerate: one device, or several under ``accelerate launch`` or
``torchrun``. What is added is the order of the data, valid states only, and the adapter in its final form.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from irq_export.peft_iec import LINEARS, IrqLoraConfig
from irq_export.quantizer import load_model
from irq_export.train.base import open_base
from irq_export.train.callbacks import MetricsCallback, OrderCallback, Report, StateCallback
from irq_export.train.config import TrainConfig
from irq_export.train.dataset import Collator, EpochOrder, load_data
from irq_export.train.run_dir import RunDir
from irq_export.train.sharding import (
    check_sharding,
    keep_float32,
    make_shardable,
    shard_on_cpu,
    sharding_arguments,
)
from irq_export.train.trainer import AdapterTrainer
from irq_export.trained_tokenizer import load_tokenizer
from irq_formats.adapter import Adapter
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import UsageError
from irq_formats.peft_adapter import read_peft_adapter, write_peft_adapter
from irq_formats.preflight import check_room

__all__ = ["TrainReport", "bytes_per_value", "train"]

#: Bytes a trained parameter that every run writes: of a state (weight, Adam's moments) and of the adapter.
_WRITTEN = 16


@dataclass(frozen=True)
class TrainReport:
    """The result of :func:`train`.

    Attributes:
        output: The directory.
        base_hash: Of its checkpoint.
        steps: Steps in all.
        loss: Of the last log.
        eval_loss: Of the last evaluation, if there was one.
        trainable: Parameters trained.
        betas: Largest magnitude of any beta; 0 without IEC.
        seconds: Wall time of this call.
        peak_bytes: Most memory that tensors took on the GPU; None on a CPU.
    """

    output: Path
    base_hash: str
    steps: int
    loss: float
    eval_loss: float | None
    trainable: int
    betas: float
    seconds: float
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report for ``--json``."""
        return {**self.__dict__, "output": str(self.output)}


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    report: Report | None = None,
    say: Callable[[str], None] = lambda line: None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainReport:
    """Fine-tune a model with IR-QLoRA.

    Args:
        config: Settings.
        resume: Continue the run in ``config.output`` where its last valid state is.
        report: Called with (steps done, steps in all, metrics).
        say: Called with lines for people.
        callbacks: More callbacks of transformers.

    Returns:
        What came out; the directory holds the rest.

    Raises:
        UsageError: Settings that contradict each other, the machine or the run that is resumed.
        OutputExists: The directory exists and the run is not resumed.
        MalformedFile: Model or data break their format.
        UnsupportedModel: Model or data are none this version handles.
        PreflightRefused: The disk has no room.
        IrqError: The training diverged.
    """
    started = time.monotonic()
    run = RunDir(Path(config.output))
    check_sharding(config)
    config = replace(config, precision=_precision(config), optimizer=_optimizer(config))
    arguments = _arguments(config, run)
    on_cuda = arguments.device.type == "cuda"  # asking for the device sets up the processes
    place = PartialState()
    say_once = say if place.is_main_process else lambda line: None
    begun = run.path.is_dir()
    if place.is_main_process:
        run.check_target(config, resume=resume)
    vocab_size = _check_model(config, run, begun=begun)
    place.wait_for_everyone()
    tokenizer = load_tokenizer(run.path if begun else config.model)
    rows, held_out = load_data(config, tokenizer, vocab_size)  # refused before anything is computed
    for note in (*rows.notes, *(held_out.notes if held_out else ())):
        say_once(note)
    with place.main_process_first():
        base_hash = run.prepare(
            config, rows.sample, device=arguments.device.type, progress=report, say=say_once
        )
    state = None
    with place.main_process_first():
        if place.is_main_process:
            data = {"data_sha256": rows.digest(), "eval_sha256": held_out.digest() if held_out else None}
            run.record(config, {"base_hash": base_hash, **data})
        if resume:
            state = run.latest_state()
    if place.is_main_process:
        run.cut_metrics(_step(state))
    if state:
        say_once(f"resuming after step {_step(state)}")
    model = _model(config, run, verify=place.is_main_process)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say_once(f"{trainable:,} parameters to train, base hash {base_hash}")
    shard_on_cpu(arguments)
    devices = place.num_processes
    order = EpochOrder(
        rows.lengths,
        config.batch_size,
        seed=config.seed,
        group=config.group_by_length,
        multiple=arguments.per_device_train_batch_size * devices if devices > 1 else 1,
    )
    trainer = AdapterTrainer(
        rows,
        order,
        held_out,
        Collator(_pad_id(tokenizer, vocab_size), packed=config.packing),
        model=model,
        args=arguments,
        callbacks=[
            OrderCallback(order),
            MetricsCallback(run.metrics, report),
            StateCallback(run, config.keep),
            *callbacks,
        ],
    )
    keep_float32(trainer)
    if state and _step(state) >= config.total_steps(len(rows)):  # the Trainer would make one step more
        trainer.state = TrainerState.load_from_json(str(state / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    betas = _write_adapter(run, base_hash, config) if place.is_main_process else 0.0
    place.wait_for_everyone()
    logs = trainer.state.log_history
    return TrainReport(
        output=run.path,
        base_hash=base_hash,
        steps=trainer.state.global_step,
        loss=_last(logs, "loss"),
        eval_loss=_last(logs, "eval_loss") if held_out else None,
        trainable=trainable,
        betas=betas,
        seconds=time.monotonic() - started,
        peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
    )


def _check_model(config: TrainConfig, run: RunDir, *, begun: bool) -> int:
    """Check the model, and the room for the run where it is not begun; return the size of the vocabulary."""
    if begun:
        return open_checkpoint(run.path, verify=False).model.vocab_size
    base = open_base(config)
    check_room(run.path, base.disk_bytes + _WRITTEN * base.trainable)
    return base.model.vocab_size


def _step(state: Path | None) -> int:
    """Steps done in a resumable state."""
    return int(state.name.removeprefix("checkpoint-")) if state else 0


def _write_adapter(run: RunDir, base_hash: str, config: TrainConfig) -> float:
    """Put the adapter of the last state where exporters look; return the largest magnitude of a beta."""
    last = run.latest_state()
    if last is None:
        raise UsageError("the run saved no state", where=run.state)
    adapter = read_peft_adapter(last)
    final = Adapter(adapter.layers, base_hash, {**adapter.meta, "lora_dropout": config.dropout})
    write_peft_adapter(run.adapter, final, base_model_name=run.path.resolve().name, overwrite=True)
    return max(max(abs(layer.beta1), abs(layer.beta2)) for layer in adapter.layers.values())


def bytes_per_value(config: TrainConfig) -> int:
    """Bytes of an activation on this machine: 2 for bf16, 4 for fp32."""
    return 2 if _precision(config) == "bf16" else 4


def _device(config: TrainConfig) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device", hint="Train on the CPU with --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device


def _precision(config: TrainConfig) -> str:
    if config.precision == "auto":
        return "bf16" if _device(config) == "cuda" else "fp32"
    return config.precision


def _arguments(config: TrainConfig, run: RunDir) -> TrainingArguments:
    """Say all of it in transformers' words."""
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    micro = config.micro_batch or config.batch_size // devices
    if micro < 1 or config.batch_size % (micro * devices):
        raise UsageError(
            "the batch is no multiple of micro-batch and devices",
            expected=f"--batch-size a multiple of {max(micro, 1) * devices}",
            got=config.batch_size,
        )
    if config.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("tensorboard is not installed", hint="pip install tensorboard")
    if config.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.state / "tensorboard")
    arguments = TrainingArguments(
        output_dir=str(run.state),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // (micro * devices),
        learning_rate=config.lr,
        lr_scheduler_type="constant_with_warmup"
        if config.schedule == "constant" and config.warmup_steps
        else config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        optim=_optimizer(config),
        bf16=_precision(config) == "bf16",
        use_cpu=_device(config) == "cpu",
        seed=config.seed,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_data else "no",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.save_every,
        report_to=["tensorboard"] if config.tensorboard else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # the buffers are the frozen base: equal everywhere, and large
        dataloader_pin_memory=_device(config) == "cuda",
        **sharding_arguments(config),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process is one device: DataParallel multiplies the batch
    return arguments


def _optimizer(config: TrainConfig) -> str:
    if config.optimizer == "paged_adamw_32bit" and find_spec("bitsandbytes") is None:
        raise UsageError(
            "bitsandbytes is not installed", hint="pip install bitsandbytes, or --optimizer adamw_torch"
        )
    if config.optimizer != "auto":
        return config.optimizer
    paged = not config.fsdp and _device(config) == "cuda" and find_spec("bitsandbytes") is not None
    return "paged_adamw_32bit" if paged else "adamw_torch"


def _model(config: TrainConfig, run: RunDir, *, verify: bool) -> PeftModel:
    """Load the base and put a fresh adapter on it."""
    dtype = torch.bfloat16 if _precision(config) == "bf16" else torch.float32
    model: PreTrainedModel = load_model(run.path, dtype=dtype, verify=verify)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        settings = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.18 renamed it
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    set_seed(config.seed)
    adapter = IrqLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets or LINEARS),
        irq_iec=config.iec,
    )
    with warnings.catch_warnings():  # PEFT 0.21 reads an attribute that transformers 5.18 renamed
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        adapted = get_peft_model(model, adapter)
    if config.fsdp:
        make_shardable(adapted)
    return adapted


def _pad_id(tokenizer: Any, vocab_size: int) -> int:
    """A token for padding; masked, so that any that the model has will do."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in ids if token is not None and token < vocab_size)


def _last(logs: list[dict[str, Any]], key: str) -> float:
    return next((float(entry[key]) for entry in reversed(logs) if key in entry), float("nan"))
