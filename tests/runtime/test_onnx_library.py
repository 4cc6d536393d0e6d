"""The custom-op library in real onnxruntime: products, precedence over bodies, refusals, releases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
from onnx_cases import (
    MARKER,
    K,
    N,
    Weight,
    check,
    check_rounding,
    inputs,
    model,
    product_and_bound,
    random_weight,
    session,
    weights,
)

from irq_formats.double_quant import decode_dq8, encode_dq8
from irq_formats.errors import UnsupportedModel
from irq_runtime import _native
from irq_runtime.onnx import library_path, register

NF4 = random_weight("nf4", 64)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_codebook_type_and_number_of_tokens_is_within_its_bound(threads: int) -> None:
    for weight in weights():
        check(weight, threads=threads)


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_lesser_instruction_sets(isa: str, repo: Path) -> None:
    before = _native.isa()
    if not _native.set_isa(isa):
        pytest.skip(f"this machine does not run {isa}")
    _native.set_isa(before)
    run_cases(repo, IRQ_ISA=isa)  # read once per process


def run_cases(repo: Path, *path: Path, **environment: str) -> str:
    """Run all cases in a process of their own and return what it says."""
    pythonpath = os.pathsep.join(str(part) for part in (*path, os.environ.get("PYTHONPATH", "")) if str(part))
    done = subprocess.run(
        [sys.executable, str(repo / "tests" / "onnx_cases.py")],
        env={**os.environ, **environment, "PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_float16_is_rounded_as_numpy_rounds() -> None:
    check_rounding()


def test_leading_dimensions_are_kept() -> None:
    a = inputs(24).reshape(2, 3, 4, K)
    (y,) = session(model(NF4)).run(None, {"A": a})
    expected, bound = product_and_bound(NF4, a.reshape(24, K))
    assert y.shape == (2, 3, 4, N)
    assert (np.abs(y.reshape(24, N) - expected) <= bound).all()
    (empty,) = session(model(NF4)).run(None, {"A": a[:, :0]})
    assert empty.shape == (2, 0, 4, N)


def test_kernel_wins_over_function_body() -> None:
    """The body of these models computes 12345: whoever ran is plain to see."""
    a = inputs(3)
    (without,) = session(model(NF4), library=False).run(None, {"A": a})
    (with_library,) = session(model(NF4)).run(None, {"A": a})
    expected, bound = product_and_bound(NF4, a)
    assert (without == MARKER).all()
    assert (np.abs(with_library - expected) <= bound).all()


@pytest.mark.parametrize("version", [2, 7, 1000])
def test_the_version_of_the_domain_is_not_seen(version: int) -> None:
    """Why spec/irq-onnx.md, section 6, gives changed operators new names: a kernel runs for any version."""
    proto = onnx.load_model_from_string(model(NF4))
    next(entry for entry in proto.opset_import if entry.domain == "irq").version = version
    a = inputs(3)
    (y,) = session(proto.SerializeToString()).run(None, {"A": a})
    expected, bound = product_and_bound(NF4, a)
    assert (np.abs(y - expected) <= bound).all()


def test_an_operator_of_another_name_is_left_to_its_body() -> None:
    proto = onnx.load_model_from_string(model(NF4))
    proto.graph.node[0].op_type = proto.functions[0].name = "MatMulBlocksNF4v2"
    (y,) = session(proto.SerializeToString()).run(None, {"A": inputs(3)})
    assert (y == MARKER).all()


def test_kernels_are_registered_once() -> None:
    """A second time, onnxruntime would refuse the session: "Domain already set in registry"."""
    for _ in range(2):  # new options, perhaps in the place of the old ones
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        register(options)
        register(options)
        run = onnxruntime.InferenceSession(model(NF4), options, providers=["CPUExecutionProvider"])
        assert (run.run(None, {"A": inputs(2)})[0] != MARKER).all()
        del options


@pytest.mark.parametrize("library", [True, False])
def test_an_optimised_model_saved_with_the_library_needs_it(library: bool, tmp_path: Path) -> None:
    """What docs/onnx.md warns of: onnxruntime keeps our nodes and drops their bodies."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    if library:
        register(options)
    onnxruntime.InferenceSession(model(NF4), options, providers=["CPUExecutionProvider"])
    saved = (tmp_path / "optimised.onnx").read_bytes()
    a = inputs(2)
    if library:
        with pytest.raises(Exception, match="MatMulBlocksNF4"):
            session(saved, library=False)
        assert (session(saved).run(None, {"A": a})[0] != MARKER).all()
    else:
        assert (session(saved, library=False).run(None, {"A": a})[0] == MARKER).all()


def test_scale_and_tau_may_be_computed() -> None:
    weight = random_weight("int4", 64)
    run = session(model(weight, dynamic=("scale", "tau")))
    a = inputs(9)
    (y,) = run.run(None, {"A": a, "scale": weight.scale, "tau": weight.tau})
    expected, bound = product_and_bound(weight, a)
    assert (np.abs(y - expected) <= bound).all()
    with pytest.raises(Exception, match=r"scale must be float \(77, 5\), got \(76, 5\)"):
        run.run(None, {"A": a, "scale": weight.scale[1:], "tau": weight.tau})


def exported(codebook: str, n: int, k: int, block_size: int = 64, *, seed: int) -> Weight:
    """A weight whose scales are fp16 and whose offsets are 8-bit values, widened, as in an export."""
    weight = random_weight(codebook, block_size, n=n, k=k, seed=seed)
    assert weight.tau is not None
    return replace(
        weight,
        scale=weight.scale.astype(np.float16).astype(np.float32),
        tau=decode_dq8(*encode_dq8(weight.tau, with_mean=False)),
    )


@pytest.mark.parametrize("codebook", ["nf4", "int4"])
@pytest.mark.parametrize(
    ("n", "k", "block_size"),
    [(77, 320, 64), (576, 576, 64), (300, 1536, 64), (64, 2048, 32), (9, 70400, 64), (5, 131136, 32)],
)
def test_scales_and_offsets_in_fewer_bytes_change_no_bit(
    codebook: str, n: int, k: int, block_size: int
) -> None:
    """Constants are narrowed when a kernel is made, inputs of the graph are not."""
    weight = exported(codebook, n, k, block_size, seed=n)
    narrow, wide = session(model(weight)), session(model(weight, dynamic=("scale", "tau")))
    for seed in range(4):
        a = inputs(1, k, seed=seed)
        (y,) = narrow.run(None, {"A": a})
        (same,) = wide.run(None, {"A": a, "scale": weight.scale, "tau": weight.tau})
        assert np.array_equal(y, same)
        expected, bound = product_and_bound(weight, a)
        assert (np.abs(y - expected) <= bound).all()


def test_two_sessions_at_once_say_what_each_says_alone() -> None:
    runs = [session(model(random_weight(name, 64, n=640)), threads=2) for name in ("nf4", "nf3")]
    jobs = [(run, inputs(m, seed=m)) for m in (1, 7, 40) for run in runs] * 8
    alone = [run.run(None, {"A": a})[0] for run, a in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: job[0].run(None, {"A": job[1]})[0], jobs))
    assert all(np.array_equal(x, y) for x, y in zip(alone, together, strict=True))


INT8 = random_weight("int8", 32, tau=False)
REFUSED = {
    "other codebook": (model(NF4, codebook="nf3"), 'codebook must be "nf4", got "nf3"'),
    "codebook is not text": (model(NF4, codebook=b"nf\xff"), r'codebook must be "nf4", got "nf\?"'),
    "no codebook": (model(NF4, codebook=None), "attribute codebook must be a string"),
    "codebook is a number": (model(NF4, codebook=4), "attribute codebook must be a string"),
    "no K": (model(NF4, K=None), "attribute K must be an integer"),
    "K negative": (model(NF4, K=-320), "K must be between 1 and 2147483647, got -320"),
    "N huge": (model(NF4, N=2**40), "N must be between 1 and"),
    "N and K huge": (
        model(NF4, N=2**31 - 1, K=2**31 - 64),
        r"codes must be uint8 \(2147483647, 1073741792\)",
    ),
    "block size": (model(NF4, block_size=48), "block_size must be 64 or 32, got 48"),
    "block size of int8": (model(INT8, block_size=64), "block_size must be 32, got 64"),
    "K no multiple": (model(NF4, K=352), "K = 352 is not a multiple of block_size = 64"),
    "K too large": (model(NF4, K=384), r"codes must be uint8 \(77, 192\), got \(77, 160\)"),
    "N too large": (model(NF4, N=78), r"codes must be uint8 \(78, 160\), got \(77, 160\)"),
    "codes flat": (model(replace(NF4, codes=NF4.codes.reshape(-1))), r"got \(12320\)"),
    "codes not constant": (model(NF4, dynamic=("codes",)), "codes must be a constant of the model"),
    "scale short": (
        model(replace(NF4, scale=NF4.scale[:, 1:])),
        r"scale must be float \(77, 5\), got \(77, 4\)",
    ),
    "tau short": (model(replace(NF4, tau=NF4.tau[:0])), r"tau must be float \(77, 5\), got \(0, 5\)"),
    "tau of int8": (model(replace(INT8, tau=INT8.scale)), "int8 blocks have no tau"),
    "tau of another type": (model(replace(NF4, tau=NF4.tau.astype(np.float16))), "Type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_constants_are_refused_when_the_model_is_loaded(case: str) -> None:
    serialized, message = REFUSED[case]
    with pytest.raises(Exception, match=message):
        session(serialized)


@pytest.mark.parametrize("shape", [(2, K + 1), (K - 64,), ()])
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(Exception, match="the last dimension of A must be K = 320"):
        session(model(NF4)).run(None, {"A": np.zeros(shape, np.float32)})


def test_one_symbol_is_exported_and_onnxruntime_is_not_linked() -> None:
    nm, ldd = shutil.which("nm"), shutil.which("ldd")
    if nm is None or ldd is None:
        pytest.skip("no nm or ldd")
    symbols = output([nm, "-D", "--defined-only", str(library_path())])
    assert [line.split()[-1] for line in symbols.splitlines()] == ["RegisterCustomOps"]
    assert "onnxruntime" not in output([ldd, str(library_path())])


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.so"))
    with pytest.raises(UnsupportedModel, match="no custom-op library"):
        library_path()


@pytest.mark.slow  # downloads 20 MB a release from the package index
@pytest.mark.parametrize("version", ["1.20.1", "1.24.4", ""])
def test_releases_of_onnxruntime(version: str, repo: Path, tmp_path: Path) -> None:
    wanted = f"onnxruntime=={version}" if version else "onnxruntime"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--upgrade",
        "--target",
        str(tmp_path),
        wanted,
    ]
    subprocess.run(command, check=True)
    for isa in ("", "scalar"):
        said = run_cases(repo, tmp_path, IRQ_ISA=isa)
        assert said.startswith(version)
