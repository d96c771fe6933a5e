"""EngineConfig: what a user may set, before the model and machine are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16")
POLICIES = ("sarathi",)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`None` and "auto" are resolved at start-up from the model and machine;
    the start-up table shows what they became."""

    model: str = "smollm2-135m-instruct"
    """Catalogue name, or a path to a GGUF file or a Hugging Face folder."""
    dtype: str = "auto"
    """Of weights and KV cache. auto: float32 on a CPU, bfloat16 on a GPU."""
    policy: str = "sarathi"
    token_budget: int | None = None
    """Most rows of a step (tau). auto: 128 on a CPU, 512 on a GPU."""
    buckets: str | tuple[int, ...] = "auto"
    """Row counts of the compiled steps. "one": a single step of token_budget
    rows, which makes outputs bit-equal whatever runs beside a request."""
    max_num_seqs: int | None = None
    """auto: 32 on a CPU, 256 on a GPU, never above the token budget."""
    max_model_len: int | None = None
    """auto: the model's own limit, at most 2048 on a CPU and 8192 on a GPU."""
    kv_cache_bytes: int | None = None
    """auto: 8 full-length sequences on a CPU; 85 % of free memory on a GPU."""
    page_size: int = 16
    watermark: float = 0.01
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    prefix_caching: bool = True
    attention: str = "auto"
    """Implementation of ragged_paged_attention; auto picks by platform."""
    compilation_cache_dir: Path | None = None
    """auto: ~/.cache/jaxserve/xla. Must be a directory of mode 0700 that the
    user owns, since it holds native code."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.policy not in POLICIES:
            raise ConfigError(f"--policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        if isinstance(self.buckets, str) and self.buckets not in ("auto", "one"):
            raise ConfigError(
                f'--buckets must be "auto", "one" or row counts like 4,32,128, not {self.buckets!r}'
            )
        if isinstance(self.buckets, tuple) and not 1 <= len(self.buckets) <= 4:
            raise ConfigError("--buckets takes one to four row counts: each is a compiled program")
        for name in ("token_budget", "max_num_seqs", "max_model_len", "kv_cache_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {value}")
        for name in ("max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive")
