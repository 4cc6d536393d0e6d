"""``irq-export train`` refuses before it computes, and goes on only with the run that was begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_training import save_tiny_training, train_arguments
from tokenizers import Tokenizer

from irq_export.cli import main
from irq_export.quantize_model import quantize
from irq_export.train.callbacks import MetricsCallback
from irq_export.train.config import TrainConfig
from irq_export.train.run_dir import RunDir
from irq_formats.safetensors_io import write_safetensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in floating point with a tokenizer, data, and a checkpoint with another codebook."""
    path = tmp_path_factory.mktemp("refused")
    save_tiny_training(path)
    assert not quantize(path / "model", path / "int4", codebook="int4", icq=False).skipped
    return path


@pytest.fixture
def nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither importance is measured nor a model quantised."""

    def computed(*args: Any, **kwargs: Any) -> None:
        pytest.fail("refused too late")

    monkeypatch.setattr("irq_export.calibrate.measure", computed)
    monkeypatch.setattr("irq_export.quantize_model.quantize", computed)
    monkeypatch.setattr("irq_export.train.run_dir._ENOUGH", 1)


def refused(arguments: list[str], exit_code: int, *says: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    assert all(text in result.stderr for text in says), result.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--targets", "lm_head"], "no such linear layer"),
        (["--targets", "q_proj", "--targets", "embed_tokens"], "got embed_tokens"),
        (["--targets", "proj"], "expected q_proj, k_proj"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(1 << 32)], "--seed"),
        (["--epochs", "inf"], "--epochs must be finite"),
        (["--lr", "inf"], "--lr must be finite"),
    ],
)
def test_settings(more: list[str], says: str, source: Path, tmp_path: Path, nothing_computes: None) -> None:
    for dry in ([], ["--dry-run"]):
        refused(train_arguments(source, tmp_path / "run", *more, *dry), 2, says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("which", "exit_code", "says"),
    [
        ("absent", 2, "no such directory"),
        ("without a tokenizer", 3, "tokenizer"),
        ("without weights", 2, "model"),
        ("with too many tokens", 3, "tokens that the model does not have"),
        ("quantised by others", 3, "quantised already"),
    ],
)
def test_models(
    which: str, exit_code: int, says: str, source: Path, tmp_path: Path, nothing_computes: None
) -> None:
    model = tmp_path / "model"
    if which != "absent":
        shutil.copytree(source / "model", model)
    if which == "without a tokenizer":
        for file in model.glob("tokenizer*"):
            file.unlink()
    elif which == "without weights":
        (model / "model.safetensors").unlink()
    elif which == "with too many tokens":
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.add_tokens([f"<new{i}>" for i in range(99)])
        tokenizer.save(str(model / "tokenizer.json"))
        rows = [{"instruction": "a", "output": "<new98>"}]
        (tmp_path / "data.json").write_text(json.dumps(rows))
    elif which == "quantised by others":
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (model / "config.json").write_text(json.dumps(config))
    data = tmp_path / "data.json" if which == "with too many tokens" else source / "data.json"
    for dry in ([], ["--dry-run"]):
        more = ["--data", str(data), *dry]
        refused(train_arguments(source, tmp_path / "run", *more, model=model), exit_code, says)
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room(
    source: Path, tmp_path: Path, nothing_computes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(train_arguments(source, tmp_path / "run"), 5, "not enough disk space")


def test_importance_of_another_model(source: Path, tmp_path: Path, nothing_computes: None) -> None:
    moments = {"model.layers.0.self_attn.q_proj": np.ones(64, np.float32)}
    write_safetensors(tmp_path / "other", moments, {"irq.importance": "1", "tokens": "1"})
    refused(
        train_arguments(source, tmp_path / "run", "--importance", str(tmp_path / "other")), 3, "not measured"
    )


@pytest.mark.parametrize(
    ("more", "got"),
    [
        (["--codebook", "int2"], "codebook int2"),
        (["--icq", "--embedding", "int8"], "icq True, embedding int8"),
        (["--no-icq"], "icq False"),
        (["--importance", "none"], "importance none"),
    ],
)
def test_how_to_quantise_what_is_quantised(more: list[str], got: str, source: Path, tmp_path: Path) -> None:
    """A checkpoint trains as it is: the record of the run would tell of settings that nothing heeded."""
    for dry in ([], ["--dry-run"]):
        arguments = train_arguments(source, tmp_path / "run", *more, *dry, model=source / "int4")
        refused(arguments, 2, "quantised already", got)
    assert not (tmp_path / "run").exists()


def test_only_a_run_is_resumed(source: Path, tmp_path: Path) -> None:
    """A checkpoint that happens to be there is none, whatever it was made of."""
    shutil.copytree(source / "int4", tmp_path / "run")
    before = sorted((tmp_path / "run").iterdir())
    refused(train_arguments(source, tmp_path / "run", "--resume"), 2, "no run was begun here")
    assert sorted((tmp_path / "run").iterdir()) == before


def test_names_on_record_are_those_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    data = ["d.json", "hf:set:train", "hf:owner/name:test"]
    config = TrainConfig(model="m", output="/o", data=tuple(data), importance="none")
    RunDir(tmp_path).record(config, {})
    settings = json.loads(RunDir(tmp_path).record_file.read_text())["settings"]
    assert settings["data"] == [f"{tmp_path}/d.json", f"hf:{tmp_path}/set:train", "hf:owner/name:test"]
    assert (settings["model"], settings["output"], settings["importance"]) == (f"{tmp_path}/m", "/o", "none")


def test_a_run_goes_on_wherever_its_data_lie(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they hold decides, by digest; names are recorded as they are from any working directory."""
    names = ["data.json", "held.json"]
    shutil.copytree(source / "model", tmp_path / "model")
    for name in names:
        shutil.copyfile(source / "data.json", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    here = ["--eval-data", "held.json", "--importance", "none", "--save-every", "1"]
    run = train_arguments(Path(), Path("run"), *here, "--steps", "1", model=Path("model"))
    assert CliRunner().invoke(main, run).exit_code == 0
    monkeypatch.chdir(source)
    again = ["train", "-o", str(tmp_path / "run"), "--resume", "--steps", "2"]
    assert CliRunner().invoke(main, again).exit_code == 0
    for name in names:
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    refused(again, 2, "data.json: no such file")
    moved = ["--data", str(tmp_path / "moved-data.json"), "--eval-data", str(tmp_path / "moved-held.json")]
    result = CliRunner().invoke(main, [*again[:-1], "3", *moved])
    assert result.exit_code == 0, result.output
    assert "3 steps" in result.stdout
    shutil.rmtree(tmp_path / "model")  # the base is in the run
    assert CliRunner().invoke(main, [*again[:-1], "4"]).exit_code == 0
    rows = json.loads((source / "data.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(rows[:-1]))
    other = ["--data", str(tmp_path / "other.json")]
    refused([*again, *other], 2, "not the run that was begun here", "data_sha256")
    refused([*again, "--eval-data", str(tmp_path / "other.json")], 2, "eval_sha256")
    refused([*again, "--codebook", "int4"], 2, "expected codebook nf4, got codebook int4")


def test_another_device_does_not_change_the_arithmetic(source: Path, tmp_path: Path) -> None:
    """What auto came to is on record: a run that a GPU began goes on in bf16 on a CPU, or not at all."""
    output = tmp_path / "run"
    path = output / "train" / "run.json"

    def arithmetic() -> tuple[str, str]:
        settings = json.loads(path.read_text())["settings"]
        return settings["precision"], settings["optimizer"]

    run = train_arguments(source, output, "--importance", "none", "--steps", "1")
    assert CliRunner().invoke(main, run).exit_code == 0
    assert arithmetic() == ("fp32", "adamw_torch")
    path.write_text(path.read_text().replace('"fp32"', '"bf16"'))
    go_on = ["train", "-o", str(output), "--resume", "--steps"]
    assert CliRunner().invoke(main, [*go_on, "2"]).exit_code == 0
    assert arithmetic() == ("bf16", "adamw_torch")
    values = json.loads(path.read_text())["settings"] | {"precision": "auto"}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    refused(
        [*go_on, "3", "--config", str(tmp_path / "run.yaml")],
        2,
        "expected precision bf16, got precision fp32",
    )
    path.write_text(path.read_text().replace('"bf16"', '"auto"'))  # as earlier versions wrote
    assert CliRunner().invoke(main, [*go_on, "3"]).exit_code == 0
    assert arithmetic() == ("fp32", "adamw_torch")


def test_what_an_interrupted_run_says(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, so it is not said to be removed."""

    def interrupt(self: MetricsCallback, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    more = ["--importance", "none", "--save-every", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(MetricsCallback, "on_step_end", interrupt)
        run = train_arguments(source, tmp_path / "run", *more)
        refused(run, 130, f"irq-export train -o {tmp_path / 'run'} --resume goes on after step 2")

        def at_once(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr("irq_export.quantize_model.quantize", at_once)
        refused(train_arguments(source, tmp_path / "other", *more), 130, "unfinished outputs were removed")
    result = CliRunner().invoke(main, ["train", "-o", str(tmp_path / "run"), "--resume", "--steps", "4"])
    assert result.exit_code == 0, result.output
