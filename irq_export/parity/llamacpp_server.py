"""The child process of :mod:`irq_export.parity.llamacpp_process`: a stock llama.cpp server on loopback.

The settings come as one JSON line on stdin, the address of the ready server leaves as one JSON
line on stdout, everything llama.cpp says goes to stderr. The process lives until stdin is closed, so
it cannot outlive its parent.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

__all__ = ["main"]


def common_params(settings: dict[str, Any]) -> Any:
    """Settings of a plain float32 evaluation on the CPU, as `xllamacpp.CommonParams`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    if settings["lora"] is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo(settings["lora"], settings["lora_scale"])
        params.lora_adapters = [adapter]
    params.n_ctx = settings["ctx"]
    params.n_parallel = 1
    params.fit_params = False  # would shrink n_ctx to what it thinks fits
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.n_gpu_layers = 0
    params.no_op_offload = True
    params.no_extra_bufts = True  # no repacking, no AMX: virtual machines advertise it and then trap
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32  # the default F16 rounds keys and values
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.cache_ram_mib = 0
    params.n_ctx_checkpoints = 0
    params.ui = False
    params.api_keys = [settings["key"]]
    params.verbosity = settings["verbosity"]
    return params


def main() -> None:
    """Serve until stdin is closed."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native code must not write into the report
    settings = json.loads(sys.stdin.readline())

    import xllamacpp

    try:
        server = xllamacpp.Server(common_params(settings))
    except RuntimeError:  # says no more than that it failed; the reason is on stderr
        sys.exit(1)
    ready = {
        "address": server.listening_address,
        "version": xllamacpp.__version__,
        "features": xllamacpp.get_system_info(),
    }
    report.write(json.dumps(ready) + "\n")
    report.close()
    sys.stdin.read()
    os._exit(0)  # the native threads have nothing to save


if __name__ == "__main__":
    main()
