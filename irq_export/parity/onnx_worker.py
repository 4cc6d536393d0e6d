"""Jobs about ONNX models that need a process of their own: ``python -m irq_export.parity.onnx_worker``.

One JSON job on stdin, one JSON answer on stdout. Peak memory is a figure of a process; and native code that
aborts takes only its own process with it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["JOBS"]

#: Options of a greedy search that nothing else moves, whatever the folder's genai_config.json says of them.
_PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_load(job: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model; return how far resident memory rose: ``{"peak": bytes, "held": bytes}``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if job["library"]:
        options.register_custom_ops_library(job["library"])
    _CLEAR.write_text("5")  # forget the peak of the imports
    before = _memory("VmRSS")
    session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    found = {"peak": _memory("VmHWM") - before, "held": _memory("VmRSS") - before}
    del session
    return found


def generate(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run onnxruntime-genai on a folder.

    Per case, that is adapter, swapped while the model stays loaded: logits of the tokens, saved to a file,
    and greedy tokens after the prompt, beyond any end. Also the tokens of some texts.
    """
    onnxruntime_genai: Any = import_module("onnxruntime_genai")
    config = onnxruntime_genai.Config(job["folder"])
    session_options: dict[str, Any] = {"intra_op_num_threads": job["threads"]}
    if job["library"]:  # genai takes a library from the model's folder or from the working directory
        os.chdir(Path(job["library"]).parent)
        session_options["custom_ops_library"] = job["library"]
    changes = {"eos_token_id": job["no_token"], "decoder": {"session_options": session_options}}
    config.overlay(json.dumps({"model": changes}))
    model = onnxruntime_genai.Model(config)
    adapters = onnxruntime_genai.Adapters(model)
    for case in job["cases"]:
        if case["adapter"]:
            adapters.load(case["adapter"], case["name"])

    def start(case: Mapping[str, Any], tokens: list[int], more: int) -> Any:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(tokens) + more, **_PLAIN)
        generator = onnxruntime_genai.Generator(model, parameters)
        if case["adapter"]:
            generator.set_active_adapter(adapters, case["name"])
        generator.append_tokens(tokens)
        return generator

    greedy = []
    for index, case in enumerate(job["cases"]):
        logits = start(case, job["tokens"], 1).get_output("logits")
        np.save(Path(job["output"]) / f"{index}.npy", logits[0])
        generator = start(case, job["prompt"], job["greedy"])
        found: list[int] = []
        while len(found) < job["greedy"] and not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        greedy.append(found)
    encoded = None
    if job["texts"]:
        tokenizer = onnxruntime_genai.Tokenizer(model)
        encoded = []
        for text, add_special in job["texts"]:
            tokenizer.update_options(add_special_tokens=str(add_special).lower())
            encoded.append(tokenizer.encode(text).tolist())
    return {"greedy": greedy, "encoded": encoded}


JOBS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "measure_load": measure_load,
    "generate": generate,
}


def _memory(key: str) -> int:
    """Return a field of this process's status, bytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    request = json.load(sys.stdin)
    sys.stdout.write("\n" + json.dumps(JOBS[request["job"]](request)) + "\n")
