"""to-onnx: what unmodified onnxruntime computes from the files, against torch and the checkpoint."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from tiny_checkpoints import write_tiny_checkpoint
from tiny_onnx import OnnxRunner, nmse
from tolerance import NMSE_FLOAT16_TINY, NMSE_FLOAT32

import irq_export
from irq_export.cli import main
from irq_export.export.onnx import plan_onnx, to_onnx
from irq_export.export.onnx.options import OnnxOptions
from irq_export.iec import attach, random_adapter
from irq_formats.adapter import Adapter
from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import open_checkpoint
from irq_formats.codebooks import CODEBOOKS
from irq_formats.errors import OutputExists, UnsupportedModel, UsageError, WrongBase
from irq_formats.manifest import check_manifest
from irq_formats.onnx.model_file import open_model
from irq_formats.peft_adapter import write_peft_adapter

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "architectures": ["MistralForCausalLM"]},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
}
BOOKS = [book for book in CODEBOOKS if book != "int8"]
IDS = np.random.default_rng(0).integers(0, 259, (2, 24))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints by (family, codebook, options), written once."""

    @functools.cache
    def make(family: str = "llama", codebook: str = "nf4", **options: bool) -> Path:
        path = tmp_path_factory.mktemp("checkpoint") / "c"
        write_tiny_checkpoint(path, BlockSpec(codebook), **options, **FAMILIES[family])
        return path

    return make


def torch_logits(checkpoint: Path, adapter: Adapter | None = None, ids=IDS, mask=None) -> np.ndarray:
    model = irq_export.load_model(checkpoint)
    if adapter is not None:
        attach(model, adapter)
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=mask).logits.numpy()


def save_adapter(checkpoint: Path, path: Path, *, rank: int, seed: int, modules=None) -> Adapter:
    adapter = random_adapter(
        irq_export.load_model(checkpoint),
        rank=rank,
        seed=seed,
        base_hash=open_checkpoint(checkpoint).base_hash,
    )
    layers = {name: layer for name, layer in adapter.layers.items() if modules is None or modules in name}
    adapter = Adapter(layers, adapter.base_hash, adapter.meta)
    write_peft_adapter(path, adapter, base_model_name="base")
    return adapter


#: Every family and every codebook; the other pairs of the grid (slow: 15 s) only pair them anew.
_COVERING = {*((family, "nf4") for family in FAMILIES), *(("qwen3", book) for book in BOOKS)}
_GRID = [
    pytest.param(family, book, marks=[] if (family, book) in _COVERING else pytest.mark.slow)
    for family in FAMILIES
    for book in BOOKS
]


@pytest.mark.parametrize(("family", "codebook"), _GRID)
def test_logits_are_torchs(family, codebook, made, tmp_path):
    expected = torch_logits(made(family, codebook))
    for attention in ("gqa", "standard"):
        to_onnx(made(family, codebook), tmp_path / attention, attention=attention)
        assert nmse(OnnxRunner(tmp_path / attention).logits(IDS), expected) <= NMSE_FLOAT32


@pytest.mark.parametrize("attention", ["gqa", "standard"])
@pytest.mark.parametrize("codebook", ["nf4", "int4", "nf3"])
def test_profile_stock_has_no_domain_of_ours(attention, codebook, made, tmp_path):
    to_onnx(made("qwen3", codebook), tmp_path / "o", profile="stock", attention=attention)
    model = open_model(tmp_path / "o").proto
    domains = {node.domain for node in model.graph.node}
    assert not model.functions
    assert domains <= {"", "com.microsoft"}
    assert ("com.microsoft" in domains) == (attention == "gqa" or codebook != "nf3")
    assert nmse(OnnxRunner(tmp_path / "o").logits(IDS), torch_logits(made("qwen3", codebook))) <= NMSE_FLOAT32


@pytest.mark.parametrize("codebook", ["nf4", "int3", "nf3"])
def test_what_the_help_says_of_attention(codebook, made, tmp_path):
    """Attention in plain ONNX is not the whole model in plain ONNX."""
    text = " ".join(CliRunner().invoke(main, ["to-onnx", "--help"]).stdout.split())
    assert "nf4 and int4 matrices still need onnxruntime's own" in text
    for bits, plain in (("4", ("nf3", "nf2")), ("own", ("nf3", "nf2", "int3", "int2"))):
        output = tmp_path / bits
        to_onnx(made("llama", codebook), output, profile="stock", attention="standard", int_bits=bits)
        operators = {node.op_type for node in open_model(output).proto.graph.node if node.domain}
        expected = {"MatMulBnb4"} if codebook == "nf4" else {"MatMulNBits"}
        assert operators == (set() if codebook in plain else expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize("profile", ["irq", "stock"])
def test_embedding_and_head(tied, embedding, profile, made, tmp_path):
    checkpoint = made(tied=tied, embedding=embedding)
    to_onnx(checkpoint, tmp_path / "o", profile=profile)
    assert nmse(OnnxRunner(tmp_path / "o").logits(IDS), torch_logits(checkpoint)) <= NMSE_FLOAT32
    names = set(open_model(tmp_path / "o").tensors)
    assert ("model.embed_tokens.codes" in names) == embedding
    assert any(name.startswith("lm_head") for name in names) != tied


@pytest.mark.parametrize("attention", ["gqa", "standard"])
def test_decoding_with_the_cache_equals_the_prefill(attention, made, tmp_path):
    to_onnx(made("qwen2"), tmp_path / "o", attention=attention)
    runner = OnnxRunner(tmp_path / "o")
    for ids, pieces in (  # onnxruntime's operator extends caches by several positions in batches of 1 only
        (IDS, [slice(0, 22), slice(22, 23), slice(23, 24)]),
        (IDS[:1], [slice(0, 7), slice(7, 8), slice(8, 9), slice(9, 24)]),
    ):
        parts, cache = [], runner.empty_cache(len(ids))
        for piece in pieces:
            logits, cache = runner.step(ids[:, piece], cache)
            parts.append(logits)
        assert cache[0].shape == (len(ids), 2, 24, 32)
        assert nmse(np.concatenate(parts, axis=1), runner.logits(ids)) <= NMSE_FLOAT32


def test_standard_attention_takes_any_mask(made, tmp_path):
    """Left padding, as Hugging Face has it."""
    to_onnx(made(), tmp_path / "o", attention="standard")
    mask = np.ones_like(IDS)
    mask[0, :5] = 0
    expected = torch_logits(made(), mask=mask)
    got = OnnxRunner(tmp_path / "o").logits(IDS, mask)
    assert nmse(got[0, 5:], expected[0, 5:]) <= NMSE_FLOAT32
    assert nmse(got[1], expected[1]) <= NMSE_FLOAT32


def test_reference_evaluator_agrees(made, tmp_path):
    """onnx's own numpy evaluator, which knows no contrib operator."""
    to_onnx(made("qwen3", "nf3"), tmp_path / "o", attention="standard")
    runner = OnnxRunner(tmp_path / "o")
    feed = {value.name: np.zeros((1, 2, 0, 32), np.float32) for value in runner.past}
    feed |= {"input_ids": IDS[:1, :5], "attention_mask": np.ones((1, 5), np.int64)}
    model = onnx.load(tmp_path / "o" / "model.onnx")
    feed |= {
        value.name: onnx.numpy_helper.to_array(value)
        for value in model.graph.initializer
        if ".lora_" in value.name
    }
    logits = ReferenceEvaluator(model).run(["logits"], feed)[0]
    assert nmse(logits, runner.logits(IDS[:1, :5])) <= NMSE_FLOAT32


@pytest.mark.parametrize("bias", [3.0, 60.0])
def test_float16_scores_stay_finite(bias, made, tmp_path):
    """Of padding, where every position is masked, and of large queries and keys, as Qwen2 has them.

    In numpy, which computes in float16 as a GPU does; onnxruntime on a CPU widens it.
    """
    to_onnx(made("qwen2", "nf3"), tmp_path / "o", attention="standard", dtype="f16")
    model = onnx.load(tmp_path / "o" / "model.onnx")
    for value in model.graph.initializer:
        if value.name.endswith(("q_proj.bias", "k_proj.bias")):
            sign = 1 if value.name.endswith("q_proj.bias") else -1
            value.raw_data = np.full(value.dims, sign * bias, np.float16).tobytes()
    ids, mask = np.concatenate([IDS[:1, :3], IDS[:1, :8]], axis=1), np.repeat([[0, 1]], [3, 8], axis=1)
    feed = {"input_ids": ids, "attention_mask": mask}
    for value in model.graph.input:
        if value.name.startswith("past"):
            feed[value.name] = np.zeros((1, 2, 0, 32), np.float16)
    slots = (value for value in model.graph.initializer if ".lora_" in value.name)
    feed |= {value.name: onnx.numpy_helper.to_array(value) for value in slots}
    logits = ReferenceEvaluator(model).run(["logits"], feed)[0]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("profile", ["irq", "stock"])
def test_adapters_are_swapped_at_run_time(profile, made, tmp_path):
    checkpoint = made("qwen2", "nf4")
    first = save_adapter(checkpoint, tmp_path / "first", rank=8, seed=1)
    second = save_adapter(checkpoint, tmp_path / "second", rank=3, seed=2, modules="v_proj")
    assert any(layer.has_iec for layer in first.layers.values())
    to_onnx(checkpoint, tmp_path / "o", adapters=[tmp_path / "first", tmp_path / "second"], profile=profile)
    runner = OnnxRunner(tmp_path / "o")
    base = torch_logits(checkpoint)
    for name, adapter in (("first", first), ("second", second), (None, None), ("first", first)):
        runner.use(tmp_path / "o" / f"{name}.onnx_adapter" if name else None)
        expected = torch_logits(checkpoint, adapter)
        assert nmse(runner.logits(IDS), expected) <= NMSE_FLOAT32
        assert adapter is None or nmse(expected, base) > 1e4 * NMSE_FLOAT32  # they do change the output


def test_a_baked_adapter_is_in_the_model_for_good(made, tmp_path):
    adapter = save_adapter(made(), tmp_path / "a", rank=4, seed=3)
    to_onnx(made(), tmp_path / "o", adapters=[tmp_path / "a"], bake_adapter=True)
    runner = OnnxRunner(tmp_path / "o")
    assert nmse(runner.logits(IDS), torch_logits(made(), adapter)) <= NMSE_FLOAT32
    assert not any(".lora_" in value.name for value in runner.session.get_inputs())
    assert "model.layers.0.mlp.up_proj.lora_A" in open_model(tmp_path / "o").tensors


def test_without_slots_there_is_no_side_branch(made, tmp_path):
    to_onnx(made(), tmp_path / "o", adapter_slots=False)
    assert "lora" not in str(open_model(tmp_path / "o").proto.graph.input)
    assert nmse(OnnxRunner(tmp_path / "o").logits(IDS), torch_logits(made())) <= NMSE_FLOAT32


def test_the_checkpoints_own_adapter_is_taken(tmp_path):
    write_tiny_checkpoint(tmp_path / "c")
    save_adapter(tmp_path / "c", tmp_path / "c" / "adapter", rank=2, seed=4)
    result = to_onnx(tmp_path / "c", tmp_path / "o")
    assert "adapter.onnx_adapter" in result.files


def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    save_adapter(made("llama", "nf3"), tmp_path / "a", rank=2, seed=5)
    with pytest.raises(WrongBase):
        to_onnx(made(), tmp_path / "o", adapters=[tmp_path / "a"])
    assert not (tmp_path / "o").exists()


def test_three_bits_stay_three_bits_if_asked_for(made, tmp_path):
    for bits, expected in (("4", 5.0), ("own", 4.0)):
        result = to_onnx(made("llama", "int3"), tmp_path / bits, int_bits=bits)
        assert result.bits_per_weight == expected
        logits = OnnxRunner(tmp_path / bits).logits(IDS)
        assert nmse(logits, torch_logits(made("llama", "int3"))) <= NMSE_FLOAT32


@pytest.mark.parametrize("attention", ["gqa", "standard"])
def test_float16(attention, made, tmp_path):
    result = to_onnx(made("llama", "int4"), tmp_path / "o", dtype="f16", attention=attention)
    assert result.read_back.rounded > 0
    assert result.bits_per_weight == 4.5
    logits = OnnxRunner(tmp_path / "o").logits(IDS)
    assert logits.dtype == np.float16
    assert nmse(logits, torch_logits(made("llama", "int4"))) <= NMSE_FLOAT16_TINY


@pytest.mark.parametrize("baked", [False, True])
def test_adapters_are_float32_in_a_float16_model(baked, made, tmp_path):
    """float16 inputs with defaults crash onnxruntime 1.23 to 1.28, and would round what was trained."""
    checkpoint = made("llama", "int4")
    adapter = save_adapter(checkpoint, tmp_path / "a", rank=4, seed=8)
    to_onnx(checkpoint, tmp_path / "o", dtype="f16", adapters=[tmp_path / "a"], bake_adapter=baked)
    graph = open_model(tmp_path / "o").proto.graph
    pairs = [tensor for tensor in graph.initializer if ".lora_" in tensor.name]
    assert len(pairs) == 2 * 14
    assert {tensor.data_type for tensor in pairs} == {onnx.TensorProto.FLOAT}
    assert len([value for value in graph.input if ".lora_" in value.name]) == (0 if baked else 2 * 14)
    runner = OnnxRunner(tmp_path / "o")
    base = torch_logits(checkpoint)
    if not baked:
        assert nmse(runner.logits(IDS), base) <= NMSE_FLOAT16_TINY
        runner.use(tmp_path / "o" / "a.onnx_adapter")
    expected = torch_logits(checkpoint, adapter)
    assert nmse(runner.logits(IDS), expected) <= NMSE_FLOAT16_TINY
    assert nmse(expected, base) > 100 * NMSE_FLOAT16_TINY


def test_matrices_without_offsets_have_no_branch(tmp_path):
    write_tiny_checkpoint(tmp_path / "c", BlockSpec("nf4", tau="none"))
    result = to_onnx(tmp_path / "c", tmp_path / "o")
    assert result.bits_per_weight == 4.5
    assert nmse(OnnxRunner(tmp_path / "o").logits(IDS), torch_logits(tmp_path / "c")) <= NMSE_FLOAT32


def test_a_context_shortens_the_rotary_tables(made, tmp_path):
    to_onnx(made(), tmp_path / "o", context=24)
    assert open_model(tmp_path / "o").tensors["rope.cos"].shape == (24, 16)
    assert nmse(OnnxRunner(tmp_path / "o").logits(IDS), torch_logits(made())) <= NMSE_FLOAT32
    with pytest.raises(UsageError):
        to_onnx(made(), tmp_path / "p", context=257)


def test_the_plan_is_what_is_written(made, tmp_path, repo):
    jsonschema = pytest.importorskip("jsonschema")
    save_adapter(made(), tmp_path / "a", rank=2, seed=6)
    plan = plan_onnx(made(), tmp_path / "o", adapters=[tmp_path / "a"])
    assert not (tmp_path / "o").exists()
    result = to_onnx(made(), tmp_path / "o", adapters=[tmp_path / "a"])
    assert plan.graph_bytes == result.files["model.onnx"]
    assert plan.data_bytes == result.files["model.onnx.data"]
    assert plan.bits_per_weight == result.bits_per_weight == 5.0
    schema = json.loads((repo / "formats/schema/plan.schema.json").read_text())
    jsonschema.validate({"schema": "irq.export/1", **plan.to_dict()}, schema)
    assert check_manifest(tmp_path / "o")["extra"]["adapters"] == {
        "a": {"base_hash": open_checkpoint(made()).base_hash}
    }


def test_same_input_same_bytes(made, tmp_path):
    for name in ("a", "b"):
        to_onnx(made(), tmp_path / name)
    for file in ("model.onnx", "model.onnx.data", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_outputs_are_not_overwritten_unasked(made, tmp_path):
    to_onnx(made(), tmp_path / "o")
    with pytest.raises(OutputExists):
        to_onnx(made(), tmp_path / "o")
    to_onnx(made("llama", "int4"), tmp_path / "o", overwrite=True)
    with pytest.raises(UsageError, match="overwrite the input"):
        to_onnx(made(), made(), overwrite=True)


def test_two_block_sizes_of_one_codebook_need_profile_stock(tmp_path, made):
    from irq_export.export.onnx.linears import choose_operators
    from irq_formats.checkpoint import QuantizedModule

    checkpoint = open_checkpoint(made())
    checkpoint.blocks["model.layers.0.mlp.up_proj"] = QuantizedModule(BlockSpec("nf4", 32), (192, 128))
    with pytest.raises(UnsupportedModel):
        choose_operators(checkpoint, dtype="float32", carry=True, as_functions=True)
    assert choose_operators(checkpoint, dtype="float32", carry=True, as_functions=False)


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "tensorrt"},
        {"adapters": ["a", "b"], "bake_adapter": True},
        {"adapters": ["a"], "adapter_slots": False},
        {"adapters": ["x/a", "y/a"]},
        {"bake_adapter": True},
    ],
)
def test_contradictions_are_refused(options, made, tmp_path):
    with pytest.raises(UsageError):
        to_onnx(made(), tmp_path / "o", **options)


def test_adapters_have_names_that_every_system_can_hold():
    for name in ("a", "Style-2_b", "v1.0", "console", "x" * 100):
        assert OnnxOptions(adapters=[f"dir/{name}"]).adapter_name(name) == name
    for name in ("a.", ".a", "a b", "CON", "nul.x", "lpt1", "x" * 101):
        with pytest.raises(UsageError, match="plain name"):
            OnnxOptions(adapters=[name])
    with pytest.raises(UsageError, match="two adapters of one name"):
        OnnxOptions(adapters=["x/Style", "y/style"])


def test_command_line(made, tmp_path):
    save_adapter(made(), tmp_path / "a", rank=2, seed=7)
    call = ["to-onnx", str(made()), "-o", str(tmp_path / "o"), "--adapter", str(tmp_path / "a"), "--json"]
    dry = CliRunner().invoke(main, [*call, "--dry-run"])
    assert dry.exit_code == 0
    assert not (tmp_path / "o").exists()
    run = CliRunner().invoke(main, call)
    assert run.exit_code == 0
    plan, result = json.loads(dry.stdout), json.loads(run.stdout)
    written = {file["path"]: file["bytes"] for file in result["files"]}
    for file in plan["files"][:2]:
        assert written[file["path"]] == file["bytes"]
    assert result["read_back"] == {"exact": 7 + 14 * 3 + 14 * 2, "rounded": 0}  # plain, blocks, adapter
    assert CliRunner().invoke(main, call).exit_code == OutputExists.exit_code
