"""Adapters as PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reads plain LoRA and IEC-LoRA. The two betas of a layer are found under the names of the released IR-QLoRA
code (``lora_default_A_scale``, ``lora_default_B_scale``) and under ours (``lora_beta1``, ``lora_beta2``),
each of shape [1]. Everything PEFT can store that is not a LoRA of linear layers is refused by name: what
is silently dropped here would be missing from the deployed model.

Stock PEFT loads an unfolded IEC adapter and drops its betas. An adapter written here with betas therefore
carries one more configuration key, which makes stock PEFT warn; a folded one is a plain PEFT adapter.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.adapter import Adapter, LoraLayer
from irq_formats.atomic import atomic_file
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.fields import Fields
from irq_formats.peft_config import PLAIN_LORA_HINT, LoraConfig, read_lora_config
from irq_formats.safetensors_io import SafeTensors, open_safetensors, write_safetensors

__all__ = [
    "BASE_HASH_KEY",
    "CONFIG_BASE_HASH_KEY",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "WITHOUT_TAU",
    "read_peft_adapter",
    "write_peft_adapter",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
BASE_HASH_KEY = "irq.base_hash"
CONFIG_BASE_HASH_KEY = "irq_base_hash"
#: Suffix of the base hash of an adapter that carries tau. Its base is another one than the checkpoint's:
#: attached to a base that has tau, it would add tau twice, and the hash check refuses that.
WITHOUT_TAU = "-without-tau"
_BASE_HASH = re.compile(rf"[0-9a-f]{{64}}({WITHOUT_TAU})?")

_PREFIX = "base_model.model."
_KEY = re.compile(
    re.escape(_PREFIX) + r"(?P<module>[^.]+(?:\.[^.]+)*)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight"
    r"|lora_default_A_scale|lora_default_B_scale|lora_beta1|lora_beta2)"
)
_RELEASED_BETAS = ("lora_default_A_scale", "lora_default_B_scale")
_OUR_BETAS = ("lora_beta1", "lora_beta2")

_REFUSED_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on an embedding",
    "modules_to_save": "a fully trained module",
    "embed_tokens.weight": "a trained embedding",
    "lm_head.weight": "a trained head",
    ".bias": "a trained bias",
}


def read_peft_adapter(directory: str | Path) -> Adapter:
    """Read an adapter directory.

    Args:
        directory: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapter, matrices in float32. ``meta`` holds "base_model_name_or_path", "task_type",
        "lora_dropout" and "beta_keys" ("none", "irq" or "released").

    Raises:
        MalformedFile: A file is missing or broken, a pair is incomplete or does not fit, a value is NaN.
        UnsupportedModel: The adapter uses something other than (IEC-)LoRA on linear layers, or pickle.
    """
    folder = Path(directory)
    config = read_lora_config(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        _refuse_missing_weights(folder)
    tensors = open_safetensors(weights)
    parts = _collect_parts(tensors, weights)
    layers = {module: _read_layer(module, keys, tensors, config, weights) for module, keys in parts.items()}
    meta: dict[str, object] = {
        key: config.raw.get(key) for key in ("base_model_name_or_path", "task_type", "lora_dropout")
    }
    meta["beta_keys"] = _beta_style(parts)
    return Adapter(layers, _read_base_hash(tensors, config, folder), meta)


def _read_base_hash(tensors: SafeTensors, config: LoraConfig, folder: Path) -> str | None:
    """Return the base hash from the metadata of the weights, or from the configuration (as PEFT saves it)."""
    places = (
        (Fields(tensors.metadata, str(folder / WEIGHTS_NAME)), BASE_HASH_KEY),
        (Fields(config.raw, str(folder / CONFIG_NAME)), CONFIG_BASE_HASH_KEY),
    )
    found = [fields.string(key) for fields, key in places if fields.has(key)]
    for value in found:
        if _BASE_HASH.fullmatch(value) is None:
            raise MalformedFile(
                "not a hash",
                where=f"{folder}: base hash",
                expected=f"64 lower-case hexadecimal digits, or these and {WITHOUT_TAU}",
                got=repr(value[:80]),
            )
    if len(set(found)) > 1:
        raise MalformedFile(
            "the two files of the adapter name different bases",
            where=folder,
            expected=found[0],
            got=found[1],
        )
    return found[0] if found else None


def _refuse_missing_weights(folder: Path) -> None:
    if (folder / "adapter_model.bin").is_file():
        raise UnsupportedModel(
            "the adapter is stored as a pickle, which can run code when it is opened",
            where=folder / "adapter_model.bin",
            expected=WEIGHTS_NAME,
            hint='Convert it once, if you trust it: python -c "import torch, safetensors.torch as s; '
            "s.save_file(torch.load('adapter_model.bin', weights_only=True), "
            f"'{WEIGHTS_NAME}')\"",
        )
    raise MalformedFile(
        "the adapter has no weights",
        where=folder,
        expected=WEIGHTS_NAME,
        hint="Point to the folder that PEFT's save_pretrained wrote.",
    )


def _collect_parts(tensors: SafeTensors, path: Path) -> dict[str, dict[str, str]]:
    """Sort the tensor names of a file into module -> part -> tensor name; nothing is left over."""
    parts: dict[str, dict[str, str]] = {}
    for name in sorted(tensors.tensors):
        match = _KEY.fullmatch(name)
        if match is None:
            reason = next((what for mark, what in _REFUSED_KEYS.items() if mark in name), "an unknown tensor")
            raise UnsupportedModel(
                f"the adapter holds {reason}",
                where=path,
                expected=f"{_PREFIX}<module>.lora_A.weight, .lora_B.weight and the two betas",
                got=name,
                hint=PLAIN_LORA_HINT,
            )
        parts.setdefault(match["module"], {})[match["part"]] = name
    if not parts:
        raise MalformedFile("the adapter holds no layers", where=path, expected="lora_A, lora_B")
    return parts


def _beta_style(parts: Mapping[str, Mapping[str, str]]) -> str:
    found = {part for keys in parts.values() for part in keys}
    if found.intersection(_RELEASED_BETAS):
        return "released"
    return "irq" if found.intersection(_OUR_BETAS) else "none"


def _read_layer(
    module: str,
    keys: Mapping[str, str],
    tensors: SafeTensors,
    config: LoraConfig,
    path: Path,
) -> LoraLayer:
    where = f"{path}: {module}"
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in keys:
            raise MalformedFile(
                "the layer misses half of its pair",
                where=where,
                expected=f"{_PREFIX}{module}.{part}",
                got=sorted(keys),
            )
    beta1, beta2 = _read_betas(keys, tensors, where)
    lora_a = tensors.read_f32(keys["lora_A.weight"])
    lora_b = tensors.read_f32(keys["lora_B.weight"])
    # scaling needs a rank; LoraLayer.validate reports the shapes that have none
    rank = lora_a.shape[0] if lora_a.ndim == 2 else 0
    scaling = config.scaling_of(module, rank) if rank else 1.0
    layer = LoraLayer(lora_a, lora_b, beta1, beta2, scaling)
    layer.validate(where)
    if rank != config.rank_of(module):
        raise MalformedFile(
            "lora_A does not have the rank of the configuration",
            where=where,
            expected=f"r = {config.rank_of(module):g}",
            got=lora_a.shape,
            hint="The two files come from different runs.",
        )
    return layer


def _read_betas(keys: Mapping[str, str], tensors: SafeTensors, where: str) -> tuple[float, float]:
    """Return (beta1, beta2); (0, 0) if the layer has no elastic connection."""
    found = [part for part in (*_RELEASED_BETAS, *_OUR_BETAS) if part in keys]
    if not found:
        return 0.0, 0.0
    if tuple(found) not in (_RELEASED_BETAS, _OUR_BETAS):
        raise MalformedFile(
            "the betas of the elastic connection are not one pair",
            where=where,
            expected=f"{' and '.join(_OUR_BETAS)}, or {' and '.join(_RELEASED_BETAS)}",
            got=found,
        )
    values = [tensors.read_f32(keys[part]) for part in found]
    for part, value in zip(found, values, strict=True):
        if value.size != 1:
            raise MalformedFile(
                f"{part} is not one number", where=where, expected="shape (1,)", got=value.shape
            )
    return float(values[0].reshape(())), float(values[1].reshape(()))


def write_peft_adapter(
    directory: str | Path,
    adapter: Adapter,
    *,
    base_model_name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter directory that stock PEFT opens; bytes depend on the arguments only.

    If any layer has an elastic connection, every layer gets ``lora_beta1`` and ``lora_beta2``, and the
    configuration a key that makes stock PEFT warn that it drops them: fold first for a plain adapter.
    The scaling of each layer survives through ``alpha_pattern`` (to 1 ulp of float64).

    Args:
        directory: Folder, created if needed.
        adapter: What to write; matrices are stored in float32.
        base_model_name: ``base_model_name_or_path``; from ``adapter.meta`` if None.
        overwrite: Replace existing files.

    Raises:
        MalformedFile: The adapter itself is not sound.
        OutputExists: A file exists and ``overwrite`` is false.
    """
    layers = dict(sorted(adapter.layers.items()))
    if not layers:
        raise MalformedFile("the adapter holds no layers", where=directory)
    for module, layer in layers.items():
        layer.validate(module)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if adapter.base_hash is not None:
        metadata[BASE_HASH_KEY] = adapter.base_hash
    write_safetensors(folder / WEIGHTS_NAME, _arrays(adapter, layers), metadata, overwrite=overwrite)
    config = _config_dict(adapter, layers, base_model_name)
    with atomic_file(folder / CONFIG_NAME, overwrite=overwrite) as file:
        file.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _config_dict(
    adapter: Adapter, layers: Mapping[str, LoraLayer], base_model_name: str | None
) -> dict[str, object]:
    ranks = {module: layer.rank for module, layer in layers.items()}
    alphas = {module: _alpha_of(layer) for module, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    meta = adapter.meta
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": meta.get("task_type") or "CAUSAL_LM",
        "base_model_name_or_path": base_model_name or meta.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": meta.get("lora_dropout") or 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "target_modules": list(layers),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }
    if adapter.has_iec:
        config["irq_iec"] = (
            "unfolded IR-QLoRA adapter: stock PEFT drops its betas; run irq-export fold-adapter"
        )
    return config


def _alpha_of(layer: LoraLayer) -> int | float:
    """Return alpha with alpha / rank equal to the scaling, an int where possible."""
    alpha = layer.scaling * layer.rank
    whole = round(alpha)
    return whole if whole / layer.rank == layer.scaling else alpha


def _arrays(adapter: Adapter, layers: Mapping[str, LoraLayer]) -> dict[str, NDArray[np.generic]]:
    """Return tensor name -> float32 array."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for module, layer in layers.items():
        stem = f"{_PREFIX}{module}"
        arrays[f"{stem}.lora_A.weight"] = layer.lora_a.astype(np.float32, copy=False)
        arrays[f"{stem}.lora_B.weight"] = layer.lora_b.astype(np.float32, copy=False)
        if adapter.has_iec:
            for name, beta in zip(_OUR_BETAS, (layer.beta1, layer.beta2), strict=True):
                arrays[f"{stem}.{name}"] = np.array([beta], np.float32)
    return arrays
