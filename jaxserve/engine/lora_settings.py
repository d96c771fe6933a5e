"""How much room there is for adapters beside the weights."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from checkpoint.errors import FormatError
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError
from models.lora_peft import read_rank

DEFAULT_MAX_RANK = 16
LARGEST_MAX_LORAS = 256
LARGEST_MAX_RANK = 512
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    max_loras: int
    max_rank: int


def resolve_loras(config: EngineConfig) -> LoraSettings | None:
    """None if there are to be no adapters. Raises ConfigError naming the flag."""
    max_loras = len(config.lora) if config.max_loras is None else config.max_loras
    if not 0 <= max_loras <= LARGEST_MAX_LORAS:
        raise ConfigError(f"--max-loras must be in [0, {LARGEST_MAX_LORAS}], not {max_loras}")
    if len(config.lora) > max_loras:
        raise ConfigError(
            f"--lora is given {len(config.lora)} times, and --max-loras {max_loras} leaves room "
            "for no more: raise it"
        )
    for name, count in Counter(name for name, _ in config.lora).items():
        if ADAPTER_NAME.fullmatch(name) is None:
            raise ConfigError(f"--lora {name}: a name has letters, digits, dots, - and _ alone")
        if count > 1:
            raise ConfigError(f"--lora {name} is given {count} times: choose different names")
    if max_loras == 0:
        if config.max_lora_rank is not None:
            raise ConfigError("--max-lora-rank has no effect without --max-loras or --lora")
        return None
    return LoraSettings(max_loras, _max_rank(config))


def _max_rank(config: EngineConfig) -> int:
    try:
        ranks = [read_rank(folder) for _, folder in config.lora]
    except FormatError as error:
        raise ConfigError(f"--lora: {error}") from error
    max_rank = config.max_lora_rank or max(ranks, default=DEFAULT_MAX_RANK)
    if max_rank > LARGEST_MAX_RANK:
        raise ConfigError(
            f"adapters have at most {LARGEST_MAX_RANK} ranks, not {max_rank} (--max-lora-rank)"
        )
    if (largest := max(ranks, default=0)) > max_rank:
        raise ConfigError(
            f"an adapter of --lora has {largest} ranks, and --max-lora-rank leaves room for "
            f"{max_rank}: raise it"
        )
    return max_rank
