"""EngineConfig: what a user may set, before the model and machine are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import ConfigError
from models.mesh_shape import ONE_DEVICE, MeshShape

DTYPES = ("auto", "float32", "bfloat16")
POLICIES = (
    "sarathi",
    "sarathi_decode_maximal",
    "orca",
    "vllm_v0",
    "fastertransformer",
    "chunked_only",
    "hybrid_only",
    "vllm_v1",
    "slack",
)
QUANTIZATIONS = ("none", "int8", "int4")
KV_CACHE_DTYPES = ("auto", "int8", "fp8_e4m3")
KERNELS = ("auto", "native", "xla")
WEIGHT_FORMATS = ("float", "native")
STEP_BUDGETS = ("tokens", "time", "slack")
SPECULATIVE_METHODS = ("none", "ngram")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`None` and "auto" are resolved at start-up from the model and machine;
    the start-up table shows what they became."""

    model: str = "smollm2-135m-instruct"
    """Catalogue name, or a path to a GGUF file or a Hugging Face folder."""
    dtype: str = "auto"
    """Of weights and, if `kv_cache_dtype` is auto, of the KV cache. auto: float32 on a CPU,
    bfloat16 on a GPU."""
    quantization: str = "none"
    """Of the projections' weights: int8 (a scale for each output channel) or int4 (one for each
    32 inputs of a channel)."""
    kv_cache_dtype: str = "auto"
    """Of keys and values. auto: that of `dtype`. int8 and fp8_e4m3 keep a scale for each head of
    each token."""
    weights_format: str = "float"
    """native: the projections of a GGUF file keep its own codes, where the native kernels have a
    layout for their type; float: they become numbers of `dtype`."""
    kernels: str = "auto"
    """What multiplies on a CPU: the native kernels or XLA's. auto: the native ones where they are
    installed and run the model as it is asked for."""
    mesh: MeshShape = ONE_DEVICE
    """Devices that serve the model. Slots, pages and token budget are those of one replica."""
    virtual_devices: int | None = None
    """Devices that a CPU is divided into, to try meshes out. None: one."""
    policy: str = "sarathi"
    step_budget: str = "tokens"
    """What limits the prefills of a step: tokens (`token_budget` rows), time
    (the predicted step keeps `slo_tbt_ms`) or slack (the deadlines of the
    requests that decode)."""
    token_budget: int | None = None
    """Most rows of a step (tau). auto: 128 on a CPU, 512 on a GPU; measured at
    start if `slo_tbt_ms` is given. Policies that put whole prompts into a step
    don't keep to it."""
    slo_tbt_ms: float | None = None
    """Objective for the time between two tokens of a stream."""
    slo_ttft_ms: float | None = None
    """Objective for the first token; deadlines follow from it."""
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
    speculative_method: str = "none"
    """ngram: drafts follow from a request's own prompt and output."""
    num_speculative_tokens: int | None = None
    """Most tokens of a draft. auto: 4."""
    prompt_lookup_max: int | None = None
    """Most last tokens that are looked up. auto: 4."""
    prompt_lookup_min: int | None = None
    """Least last tokens that must stand somewhere before. auto: 2."""
    lora: tuple[tuple[str, Path], ...] = ()
    """Name and folder of the adapters to begin with."""
    max_loras: int | None = None
    """Adapters at once. auto: as many as `lora` names."""
    max_lora_rank: int | None = None
    """auto: the largest of `lora`, or 16 if there are none."""
    compilation_cache_dir: Path | None = None
    """auto: ~/.cache/jaxserve/xla. Must be a directory of mode 0700 that the
    user owns, since it holds native code."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"--quantization must be one of {', '.join(QUANTIZATIONS)}, not "
                f"{self.quantization!r}"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"--kv-cache-dtype must be one of {', '.join(KV_CACHE_DTYPES)}, not "
                f"{self.kv_cache_dtype!r}"
            )
        self._check_kernels()
        if self.policy not in POLICIES:
            raise ConfigError(f"--policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        if isinstance(self.buckets, str) and self.buckets not in ("auto", "one"):
            raise ConfigError(
                f'--buckets must be "auto", "one" or row counts like 4,32,128, not {self.buckets!r}'
            )
        if isinstance(self.buckets, tuple) and not 1 <= len(self.buckets) <= 4:
            raise ConfigError("--buckets takes one to four row counts: each is a compiled program")
        self._check_objectives()
        self._check_speculation()
        for name in (
            "token_budget",
            "max_num_seqs",
            "max_model_len",
            "kv_cache_bytes",
            "page_size",
            "virtual_devices",
            "max_lora_rank",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {value}")
        for name in ("max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive")

    def _check_kernels(self) -> None:
        if self.kernels not in KERNELS:
            raise ConfigError(
                f"--kernels must be one of {', '.join(KERNELS)}, not {self.kernels!r}"
            )
        if self.weights_format not in WEIGHT_FORMATS:
            raise ConfigError(
                f"--weights-format must be one of {', '.join(WEIGHT_FORMATS)}, not "
                f"{self.weights_format!r}"
            )

    def _check_speculation(self) -> None:
        if self.speculative_method not in SPECULATIVE_METHODS:
            raise ConfigError(
                f"--speculative-method must be one of {', '.join(SPECULATIVE_METHODS)}, not "
                f"{self.speculative_method!r}"
            )
        if self.speculative_method == "none":
            for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
                if getattr(self, name) is not None:
                    flag = name.replace("_", "-")
                    raise ConfigError(f"--{flag} has no effect without --speculative-method ngram")

    def _check_objectives(self) -> None:
        if self.step_budget not in STEP_BUDGETS:
            raise ConfigError(
                f"--step-budget must be one of {', '.join(STEP_BUDGETS)}, not {self.step_budget!r}"
            )
        for flag, value in (("tbt", self.slo_tbt_ms), ("ttft", self.slo_ttft_ms)):
            if value is not None and not value > 0:
                raise ConfigError(f"--slo-{flag}-ms must be positive, not {value}")
        if self.step_budget != "tokens" and self.slo_tbt_ms is None:
            raise ConfigError(f"--step-budget {self.step_budget} needs --slo-tbt-ms")
        if self.slo_ttft_ms is not None and "slack" not in (self.policy, self.step_budget):
            raise ConfigError("--slo-ttft-ms needs --policy slack or --step-budget slack")
        by_time = self.slo_tbt_ms is not None and self.step_budget == "tokens"
        if by_time and self.token_budget is not None:
            raise ConfigError(
                "--slo-tbt-ms chooses the token budget: leave --token-budget out, or give "
                "--step-budget time"
            )
