"""Export a checkpoint to ONNX, run it in unmodified onnxruntime, and compare with torch.

Prints one JSON line: bytes, seconds and peak memory of the export; seconds and peak memory of loading (as a
ratio to the file); logits against torch float32 (NMSE, over the first tokens of a text); whether 32 greedy
tokens are torch's; milliseconds a token through the function bodies. One thread.

Run: python scripts/measure_onnx.py CHECKPOINT --adapter ADAPTER --text FILE [--profile stock] ...
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def memory_mb(key: str) -> float:
    """VmRSS, VmHWM, RssAnon or RssFile of this process."""
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) / 1024


def export(arguments: argparse.Namespace, output: Path) -> dict[str, object]:
    from irq_export.export.onnx import to_onnx

    start = time.perf_counter()
    result = to_onnx(
        arguments.checkpoint,
        output,
        adapters=[arguments.adapter] if arguments.adapter else (),
        profile=arguments.profile,
        attention=arguments.attention,
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "bytes": {name: size for name, size in result.files.items() if "onnx" in name},
        "bits_per_weight": result.bits_per_weight,
        "bit_exact_tensors": result.read_back.exact,
        "export_s": round(seconds, 2),
        "export_peak_mb": round(peak),
    }


def run(directory: Path, tokens: np.ndarray, adapter: str | None, count: int) -> dict[str, object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    size = sum((directory / name).stat().st_size for name in ("model.onnx", "model.onnx.data")) / 2**20
    before, start = memory_mb("VmRSS"), time.perf_counter()
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"), options)
    report = {
        "file_mb": round(size, 1),
        "load_s": round(time.perf_counter() - start, 2),
        "load_peak_ratio": round((memory_mb("VmHWM") - before) / size, 2),
    }
    run_options = onnxruntime.RunOptions()
    if adapter:
        lora = onnxruntime.LoraAdapter()
        lora.Load(adapter)
        run_options.add_active_adapter(lora)
    past = [value for value in session.get_inputs() if value.name.startswith("past")]
    cache = [np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in past]
    ids, seen, greedy = tokens[None], 0, []
    start = time.perf_counter()
    while len(greedy) < count:
        seen += ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64)}
        feed |= {value.name: array for value, array in zip(past, cache, strict=True)}
        logits, *cache = session.run(None, feed, run_options)
        if not greedy:
            np.save(directory / "logits.npy", logits[0])
            start = time.perf_counter()
        greedy.append(int(logits[0, -1].argmax()))
        ids = np.array([[greedy[-1]]])
    report["ms_per_token"] = round((time.perf_counter() - start) / (count - 1) * 1000, 1)
    return {**report, "greedy": greedy}


def compare(arguments: argparse.Namespace, tokens: np.ndarray, logits: np.ndarray) -> tuple[float, list[int]]:
    from irq_export.parity.runtimes import TorchRuntime
    from irq_formats.peft_adapter import read_peft_adapter

    adapter = read_peft_adapter(arguments.adapter) if arguments.adapter else None
    torch = TorchRuntime(arguments.checkpoint, adapter, "float32")
    expected = torch.logits(tokens).astype(np.float64)
    return float(np.square(logits - expected).mean() / expected.var()), torch.greedy(tokens, arguments.greedy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--greedy", type=int, default=32)
    parser.add_argument("--profile", default="irq")
    parser.add_argument("--attention", default="gqa")
    parser.add_argument("--stage", choices=["export", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage == "export":
        print(json.dumps(export(arguments, arguments.directory)))
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    text = arguments.text.read_text()[: 32 * arguments.tokens]
    tokens = np.array(tokenizer.encode(text).ids[: arguments.tokens], np.int64)
    if arguments.stage == "run":
        adapter = next(arguments.directory.glob("*.onnx_adapter"), None)
        print(json.dumps(run(arguments.directory, tokens, str(adapter or ""), arguments.greedy)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.checkpoint.parent) as scratch:
        directory = Path(scratch) / "model"
        report: dict[str, object] = {"checkpoint": arguments.checkpoint.name}
        for stage in ("export", "run"):  # processes of their own, so that peaks are theirs
            command = [sys.executable, *sys.argv, "--stage", stage, "--directory", str(directory)]
            report |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        nmse, greedy = compare(arguments, tokens, np.load(directory / "logits.npy").astype(np.float64))
    report |= {"nmse": float(f"{nmse:.2g}"), "greedy_equal": report.pop("greedy") == list(map(int, greedy))}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
