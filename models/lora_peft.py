"""LoRA adapters as the files of the `peft` library: adapter_config.json, adapter_model.safetensors.

Names and orientations are those of peft for a Hugging Face causal model: the projection
`model.layers.0.self_attn.q_proj.weight` has the adapter
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` `[r, in]` and `lora_B` `[out, r]`.
What peft offers beyond plain adapters of projections is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from checkpoint.errors import FormatError
from checkpoint.formats.safetensors import SafetensorsFile
from checkpoint.name_table import LAYER, TRANSPOSE, TensorRule
from checkpoint.param_loading import flatten, unflatten
from models.config import ModelConfig
from models.lora import Lora
from models.registry import get_family

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 2**20
MAX_NAMES_IN_ERROR = 10
MAX_NAME_CHARS = 64

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "layer_replication": (None, []),
    # The others take something out of the base model's weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
"""Fields that would change the adapters' effect, with the values that do not."""

WITHOUT_EFFECT = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora"),
        *("target_modules", "exclude_modules", "layers_pattern", "megatron_core"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
        *("qalora_group_size", "kasa_config", "ensure_weight_tying", "runtime_config"),
    )
)
"""Fields that are read here, or say only how the adapter was made and where: which projections
have one is seen in the weights' file."""


def save_peft(
    folder: Path,
    lora: Lora,
    config: ModelConfig,
    *,
    base_model: str = "",
    overwrite: bool = False,
) -> None:
    """Write adapters so that `peft.PeftModel.from_pretrained(model, folder)` reads them.

    Args:
        folder: is made if it is missing.
        lora: adapters of any float dtype; they are stored in it.
        config: the base model's.
        base_model: its name or path, for the reader's information.
        overwrite: whether files that are there may be replaced.

    Raises:
        FormatError: the folder holds an adapter already and `overwrite` is False, or there are
            adapters of projections whose rows peft's model has in another order.
    """
    present = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (folder / name).exists()]
    if present and not overwrite:
        raise FormatError(
            f"{folder} already holds {present[0]}; choose another folder, or ask to overwrite it"
        )
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(lora.adapters).items()}
    tensors: dict[str, npt.NDArray[Any]] = {}
    targets = set()
    rank = 0
    for rule in _projection_rules(config):
        path = rule.path.removesuffix(".kernel")
        if f"{path}.a" not in leaves:
            continue
        low, high = leaves.pop(f"{path}.a"), leaves.pop(f"{path}.b")
        rank = low.shape[-1]
        targets.add(path.split(".")[-1])
        for layer in range(low.shape[0]):
            name_a, name_b = _adapter_names(rule, layer)
            tensors[name_a] = np.ascontiguousarray(low[layer].T)
            tensors[name_b] = np.ascontiguousarray(high[layer].T)
    if leaves or not tensors:
        raise FormatError(
            f"peft's format has no place for {', '.join(sorted(leaves)) or 'no adapters'} of a "
            f"{config.family} model; merge them into its weights instead"
        )
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": lora.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    partial_weights = folder / f"{WEIGHTS_FILE}.partial"
    save_file(tensors, partial_weights, metadata={"format": "pt"})
    partial_config = folder / f"{CONFIG_FILE}.partial"
    partial_config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    partial_weights.replace(folder / WEIGHTS_FILE)
    partial_config.replace(folder / CONFIG_FILE)


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What the files hold, on the host."""

    leaves: Mapping[str, npt.NDArray[Any]]
    """`layers.….a` `[L, in, r]` and `layers.….b` `[L, r, out]` of the projections that the file
    has, in its dtype."""
    rank: int
    scale: float
    """Of every product of a and b."""


def read_rank(folder: Path) -> int:
    """Ranks of the adapter in `folder`. Raises FormatError as `read_peft`."""
    return _rank_and_scale(_read_config(folder / CONFIG_FILE))[0]


def load_peft(folder: Path, config: ModelConfig) -> Lora:
    """What `read_peft` reads, as arrays of the default device."""
    adapter = read_peft(folder, config)
    leaves = {path: jnp.asarray(leaf) for path, leaf in adapter.leaves.items()}
    return Lora(unflatten(leaves), adapter.scale)


def read_peft(folder: Path, config: ModelConfig) -> PeftAdapter:
    """Read adapters that peft or `save_peft` wrote for a model of shape `config`.

    Raises:
        FormatError: a file that is missing or broken, a setting that is not supported, or
            tensors that are missing, unknown or of a wrong shape; the message names them.
    """
    fields = _read_config(folder / CONFIG_FILE)
    rank, scale = _rank_and_scale(fields)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FormatError(f"{folder} holds no {WEIGHTS_FILE}; pickled adapters are never read")
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    left = set(file.names())
    problems: list[str] = []
    adapters: dict[str, npt.NDArray[Any]] = {}
    kernels = flatten(get_family(config.family).abstract_params(config, jnp.float32))
    for rule in _projection_rules(config):
        num_layers, num_in, num_out = kernels[rule.path].shape
        names = [_adapter_names(rule, layer) for layer in range(num_layers)]
        if not left & {name for pair in names for name in pair}:
            continue
        path = rule.path.removesuffix(".kernel")
        for part, shape, own in zip(
            "ab", ((rank, num_in), (num_out, rank)), zip(*names, strict=True), strict=True
        ):
            left -= set(own)
            found = list(_problems(file, own, shape))
            problems += found
            if not found:
                adapters[f"{path}.{part}"] = np.stack([file.read(name).T for name in own])
    problems += [f"unexpected: {name}" for name in sorted(left)]
    if problems or not adapters:
        shown = problems[:MAX_NAMES_IN_ERROR] or ["there are no adapters"]
        raise FormatError(
            f"{WEIGHTS_FILE} does not fit the model; was it made for this one?\n  "
            + "\n  ".join(shown)
        )
    return PeftAdapter(adapters, rank, scale)


def adapted_projections(config: ModelConfig) -> tuple[str, ...]:
    """Paths, such as `layers.attention.q_proj`, of all that an adapter's file may have."""
    return tuple(rule.path.removesuffix(".kernel") for rule in _projection_rules(config))


def _projection_rules(config: ModelConfig) -> Iterator[TensorRule]:
    """The Hugging Face names of all projections of layers that are stored as they are: those
    of experts, or with rows in another order, would need their adapters rearranged."""
    table = get_family(config.family).name_tables["hf"](config)
    return (
        rule
        for rule in table.rules
        if rule.path.endswith(".kernel")
        and rule.num_stacked_axes == 1
        and rule.transform.name == TRANSPOSE.name
    )


def _adapter_names(rule: TensorRule, layer: int) -> tuple[str, str]:
    projection = PREFIX + rule.name.replace(LAYER, str(layer)).removesuffix("weight")
    return f"{projection}lora_A.weight", f"{projection}lora_B.weight"


def _problems(
    file: SafetensorsFile, names: tuple[str, ...], shape: tuple[int, ...]
) -> Iterator[str]:
    present = set(file.names())
    for name in names:
        if name not in present:
            yield f"missing: {name}"
        elif file.info(name).shape != shape:
            yield f"wrong shape: {name} is {file.info(name).shape}, the model needs {shape}"
        elif "float" not in file.info(name).dtype:
            yield f"wrong dtype: {name} is {file.info(name).dtype}, not a floating-point type"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FormatError(f"{path.parent} holds no {CONFIG_FILE}, so it is not a peft adapter")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise FormatError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{CONFIG_FILE} must hold a JSON object")
    return fields


def _rank_and_scale(fields: Mapping[str, Any]) -> tuple[int, float]:
    """r, and alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023)."""
    if fields.get("peft_type") != "LORA":
        raise FormatError(
            f"{CONFIG_FILE}: peft_type is {fields.get('peft_type')!r}; only 'LORA' is supported"
        )
    for name, harmless in HARMLESS.items():
        if name in fields and fields[name] not in harmless:
            raise FormatError(
                f"{CONFIG_FILE}: {name} {fields[name]!r} is not supported, only "
                f"{harmless[0]!r}; merge the adapter with peft and convert the merged model"
            )
    unknown = [
        name
        for name in fields
        if name not in HARMLESS
        and name not in WITHOUT_EFFECT
        and fields[name] not in (None, False, [], {}, "")
    ]
    if unknown:
        raise FormatError(
            f"{CONFIG_FILE}: {unknown[0][:MAX_NAME_CHARS]!r} is not known here, and may change "
            "what the adapter does; merge it with peft and convert the merged model"
        )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise FormatError(f"{CONFIG_FILE}: r is {rank!r}; it must be a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise FormatError(f"{CONFIG_FILE}: lora_alpha is {alpha!r}; it must be a positive number")
    stabilised = fields.get("use_rslora", False)
    return rank, alpha / (rank**0.5 if stabilised else rank)
