"""``irq-export train``: settings, a whole run to a proved file, resuming after SIGKILL."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_training import held_out_curve, loss_curve, save_tiny_training
from tiny_training import train_arguments as arguments
from tolerance import SUM_ORDER_FLOAT32
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from irq_export.cli import main
from irq_export.quantizer import load_model
from irq_export.train.config import TrainConfig, make_config, settings
from irq_export.train.dataset import Collator, load_rows
from irq_export.train.memory import estimate_memory
from irq_export.train.run import _arguments, train
from irq_export.train.run_dir import RunDir
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import IrqError, MalformedFile, UsageError
from irq_formats.peft_adapter import read_peft_adapter


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in floating point with a tokenizer, and data."""
    path = tmp_path_factory.mktemp("train")
    save_tiny_training(path)
    return path


def invoke(*args: str) -> Any:
    result = CliRunner().invoke(main, [*args, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def finished(source: Path) -> Path:
    """A run of ten steps in two epochs, never interrupted, and nothing deprecated on the way."""
    output = source / "finished"
    command = arguments(source, output, "--epochs", "2", "--save-every", "3", "--dropout", "0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        report = invoke(*command)["train"]
    assert (report["steps"], report["output"]) == (10, str(output))
    assert report["betas"] > 0
    return output


@pytest.mark.parametrize("importance", ["data", "none", "file"])
def test_importance_of_the_training_data(
    source: Path, tmp_path: Path, importance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it is measured where there are tokens enough, and said where there are not."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dogs " * 40)
    if importance == "file":
        invoke("calibrate", str(source / "model"), str(text), "-o", str(tmp_path / "file"), "--context", "64")
    more = ["--importance", str(tmp_path / "file") if importance == "file" else importance, "--steps", "1"]
    for enough in (10**6, 64):
        monkeypatch.setattr("irq_export.train.run_dir._ENOUGH", enough)
        monkeypatch.setattr("irq_export.train.run_dir._CONTEXT", 64)
        output = tmp_path / f"{enough}"
        result = CliRunner().invoke(main, arguments(source, output, *more))
        assert result.exit_code == 0, result.output
        search = open_checkpoint(output).config["quantization_config"]["search"]
        measured = importance == "file" or (importance == "data" and enough == 64)
        assert search.get("importance", False) is measured
        assert measured or search["icq"] is False  # nf4: the default of quantize
        assert ("is not measured" in result.stderr) is (importance == "data" and enough == 10**6)


def test_a_run_is_a_checkpoint_that_deploys(finished: Path, tmp_path: Path) -> None:
    losses = [loss for _, loss, _ in loss_curve(finished)]
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    checkpoint = open_checkpoint(finished)
    assert checkpoint.adapter_dir is not None
    adapter = read_peft_adapter(checkpoint.adapter_dir)
    assert adapter.base_hash == checkpoint.base_hash
    assert all(layer.beta1 and layer.beta2 for layer in adapter.layers.values())
    assert [path.name for path in RunDir(finished).states()] == ["checkpoint-9", "checkpoint-10"]
    invoke("to-gguf", str(finished), "-o", str(tmp_path / "model.gguf"))
    small = ["--positions", "48", "--greedy", "8"]
    report = invoke("verify", str(tmp_path / "model.gguf"), "--against", str(finished), *small)
    assert report["passed"] is True
    assert all(check["passed"] is not False for check in report["checks"])


def test_a_finished_run_is_neither_overwritten_nor_repeated(finished: Path, source: Path) -> None:
    before = loss_curve(finished)
    again = CliRunner().invoke(main, arguments(source, finished))
    assert again.exit_code == 6
    assert "--resume" in again.output
    report = invoke("train", "-o", str(finished), "--resume")  # everything else is on record
    assert report["train"]["steps"] == 10
    assert loss_curve(finished) == before
    other = CliRunner().invoke(main, ["train", "-o", str(finished), "--resume", "--lr", "5"])
    assert other.exit_code == 2
    assert "not the run that was begun here" in other.output


def test_killed_and_resumed_is_the_same_run(finished: Path, source: Path) -> None:
    """SIGKILL somewhere after the first state, in another process; then --resume agrees step for step."""
    output = source / "killed"
    command = arguments(source, output, "--epochs", "2", "--save-every", "3", "--dropout", "0.1")
    slow = "import time; from irq_export.train import callbacks as c; w = c.MetricsCallback.on_log\n"
    slow += "def on_log(self, *a, **k): w(self, *a, **k); time.sleep(0.2)\n"
    slow += "c.MetricsCallback.on_log = on_log; from irq_export.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", slow, *command], stderr=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 120
        metrics = output / "train" / "metrics.jsonl"
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < 5:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    steps = [step for step, *_ in loss_curve(output)]
    assert 5 <= steps[-1] < 10
    state = RunDir(output).states()[-1]
    assert state.name == "checkpoint-3"
    (output / "train" / "checkpoint-6").mkdir(exist_ok=True)  # a state that was being written
    (output / "train" / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    invoke(*command, "--resume")
    assert loss_curve(output) == loss_curve(finished)
    ours, theirs = (read_peft_adapter(path / "adapter") for path in (output, finished))
    for name, layer in theirs.layers.items():
        assert ours.layers[name].lora_b.tobytes() == layer.lora_b.tobytes()
        assert (ours.layers[name].beta1, ours.layers[name].beta2) == (layer.beta1, layer.beta2)


def test_held_out_loss_is_a_mean_over_tokens(source: Path, tmp_path: Path) -> None:
    """Of any micro-batch, and what the model itself says of the same rows at once."""
    data = str(source / "data.json")
    found = []
    for micro in ("4", "1"):
        more = ["--steps", "1", "--eval-data", data, "--micro-batch", micro, "--lr", "1e-30"]
        invoke(*arguments(source, tmp_path / micro, *more, "--importance", "none"))
        found += held_out_curve(tmp_path / micro)
    assert [step for step, _ in found] == [1, 1]  # it ends with an evaluation
    assert found[0][1] == pytest.approx(found[1][1], rel=SUM_ORDER_FLOAT32)
    config = TrainConfig(max_length=96, prompt="plain")
    rows = load_rows([data], AutoTokenizer.from_pretrained(source / "model"), config)
    with torch.no_grad():
        loss = load_model(tmp_path / "1")(**Collator(0)(rows.rows)).loss
    assert found[1][1] == pytest.approx(float(loss), rel=SUM_ORDER_FLOAT32)


def test_qlora_is_the_run_without_iec_and_icq(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "qlora"
    more = ["--steps", "1", "--no-iec", "--no-icq", "--packing", "--eval-data", str(source / "data.json")]
    report = invoke(*arguments(source, output, *more, "--eval-every", "1", "--tensorboard"))["train"]
    assert report["betas"] == 0
    assert report["eval_loss"] > 0
    assert len(list((output / "train" / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert not read_peft_adapter(output / "adapter").has_iec
    assert {spec.tau for spec in open_checkpoint(output).quantization.modules.values()} == {"none"}


def test_icq_is_there_for_the_asking(source: Path, tmp_path: Path) -> None:
    """``--icq`` replaces the fit to the importance, and is refused beside one."""
    invoke(*arguments(source, tmp_path / "run", "--steps", "1", "--icq"))
    search = open_checkpoint(tmp_path / "run").config["quantization_config"]["search"]
    assert (search["icq"], search["refine"]) == (True, "ls")
    for flag in ("--icq", "--no-icq"):
        more = [flag, "--importance", str(tmp_path / "file")]
        result = CliRunner().invoke(main, arguments(source, tmp_path / "other", *more))
        assert result.exit_code == UsageError.exit_code
        assert "--importance" in result.stderr


def test_a_quantised_model_trains_as_it_is(finished: Path, source: Path, tmp_path: Path) -> None:
    invoke(*arguments(source, tmp_path / "run", "--steps", "1", model=finished))
    assert open_checkpoint(tmp_path / "run").base_hash == open_checkpoint(finished).base_hash


def test_dry_run_says_what_it_costs_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    plan = invoke(*arguments(source, tmp_path / "run", "--dry-run"))["plan"]
    assert not (tmp_path / "run").exists()
    assert plan["steps"] == 15
    config = make_config({"model": str(source / "model"), "data": ("x",), "output": "o", "rank": 4})
    estimate = estimate_memory(config, bytes_per_value=4)
    assert estimate.trainable == plan["memory"]["trainable"] == 2 * (4 * 2 * 64 * 5 + 2 * 4 * 96 + 2 * 7)
    assert estimate.adapter == 16 * estimate.trainable


@pytest.mark.parametrize(
    "targets", [["model.layers.0.self_attn.q_proj"], ["self_attn.q_proj", "mlp.down_proj"]]
)
def test_dry_run_counts_as_the_run_does(targets: list[str], source: Path, tmp_path: Path) -> None:
    """Targets by more than the last part of a name, and a part of an epoch, which is rounded up."""
    more = [word for target in targets for word in ("--targets", target)]
    more += ["--epochs", "0.05", "--importance", "none"]
    plan = invoke(*arguments(source, tmp_path / "run", "--dry-run", *more))["plan"]
    run = invoke(*arguments(source, tmp_path / "run", *more))["train"]
    assert plan["steps"] == run["steps"] == 1
    assert plan["memory"]["trainable"] == run["trainable"] > 0


def test_every_setting_is_a_flag_and_a_key(tmp_path: Path) -> None:
    options = {option for parameter in main.get_command(None, "train").params for option in parameter.opts}  # type: ignore[arg-type, attr-defined]
    assert {setting.flag for setting in settings() if setting.name != "model"} <= options
    path = tmp_path / "run.json"
    path.write_text(json.dumps(TrainConfig(model="m", data=("d",), output="o", lr=1e-3).to_dict()))
    assert make_config({}, path) == TrainConfig(model="m", data=("d",), output="o", lr=1e-3)


def test_one_process_is_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two are seen, transformers would spread twice the batch over them."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    config = TrainConfig(model="m", data=("d",), output=str(tmp_path), device="cpu")
    assert _arguments(config, RunDir(tmp_path))._n_gpu == 1


def test_paper_recipe_is_the_default() -> None:
    config = TrainConfig()
    assert (config.rank, config.alpha, config.lr, config.schedule, config.batch_size) == (
        64,
        16,
        2e-4,
        "constant",
        16,
    )
    assert (config.iec, config.icq, config.max_grad_norm, config.weight_decay) == (True, None, 0.3, 0)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ndata: d.json\nlr: 2e-4\nrank: 8\niec: false\n")
    config = make_config({"rank": 16, "output": "o", "steps": None, "data": ()}, tmp_path / "r.yaml")
    assert (config.rank, config.lr, config.data, config.iec, config.output) == (
        16,
        2e-4,
        ("d.json",),
        False,
        "o",
    )
    (tmp_path / "r.toml").write_text('model = "m"\ndata = ["d.json"]\nmax-length = 64\n')
    assert make_config({"output": "o"}, tmp_path / "r.toml").max_length == 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rate: 1", "unknown key"),
        ("rnk: 8", "Did you mean rank"),
        ("rank: eight", "wrong type"),
        ("rank: true", "wrong type"),
        ("iec: 1", "wrong type"),
        ("rank: [", "not YAML"),
        ("- rank", "not a table"),
        ("rank: -1", "must be positive"),
        ("prompt: alpacca", "unknown --prompt"),
        ("rank: 4", "MODEL is missing"),
    ],
)
def test_files_with_mistakes_are_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises((UsageError, MalformedFile), match=says):
        make_config({}, tmp_path / "r.yaml")


def test_a_run_that_diverges_stops(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, arguments(source, tmp_path / "run", "--steps", "9", "--lr", "1e30"))
    assert result.exit_code == IrqError.exit_code
    assert "diverged" in result.output


def test_a_run_that_diverges_between_two_logs_keeps_its_good_states(source: Path, tmp_path: Path) -> None:
    """Its adapter is looked at whenever it is saved; here the learning rate is too high from step 3 on."""

    class Explode(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any
        ) -> None:
            if state.global_step == 2:
                optimizer.param_groups[0]["lr"] = float("inf")

    values = {
        "model": str(source / "model"),
        "data": (str(source / "data.json"),),
        "rank": 4,
        "device": "cpu",
    }
    values |= {"output": str(tmp_path / "run"), "prompt": "plain", "importance": "none", "steps": 9}
    config = TrainConfig(**values, save_every=1, keep=1, log_every=100)
    with pytest.raises(IrqError, match=r"step 3: the training diverged; got .*Start again with a lower --lr"):
        train(config, callbacks=[Explode()])
    assert [path.name for path in (tmp_path / "run" / "train").glob("checkpoint-*")] == ["checkpoint-2"]
    assert RunDir(tmp_path / "run").latest_state() is not None


def test_a_finished_run_makes_no_further_step(source: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, too, where it ends because of --steps."""
    output = tmp_path / "run"
    first = invoke(*arguments(source, output, "--importance", "none", "--steps", "2"))["train"]
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    again = invoke("train", "-o", str(output), "--resume")["train"]
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert [step for step, *_ in loss_curve(output)] == [1, 2]
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_the_last_steps_are_logged(source: Path, tmp_path: Path) -> None:
    """What is reported as the loss is that of the last steps, not of the first."""
    output = tmp_path / "run"
    more = ["--importance", "none", "--steps", "4", "--log-every", "10"]
    report = invoke(*arguments(source, output, *more))["train"]
    assert [step for step, *_ in loss_curve(output)] == [1, 4]
    assert report["loss"] == loss_curve(output)[-1][1]
