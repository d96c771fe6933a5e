"""EngineSettings: an EngineConfig resolved for one model on one device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.lora_settings import LoraSettings, resolve_loras
from jaxserve.engine.memory_plan import bytes_per_device, choose_num_pages
from jaxserve.engine.native_settings import FileKinds, NativeSettings, resolve_native
from jaxserve.engine.request import ServiceObjective
from jaxserve.engine.scheduler.config import SchedulerConfig, SpeculationConfig
from jaxserve.engine.scheduler.deadlines import DEFAULT_OBJECTIVE
from jaxserve.engine.scheduler.policies import make_policy
from jaxserve.engine.step_inputs import StepLayout
from jaxserve.errors import ConfigError
from jaxserve.model_store import default_root
from models.adapter_pool import AdapterPool, pool_shapes
from models.config import ModelConfig
from models.decoder import Params
from models.gpu_layout import shapes_on_gpu
from models.mesh_shape import ONE_DEVICE, MeshShape
from models.native_layout import native_shapes
from models.ops.attention.kv_pool import storage_dtype
from models.ops.attention.registry import AttentionImplementation, select
from models.ops.attention.work import AttentionTiling
from models.quantization import check_quantizable, quantized_shapes
from models.registry import get_family
from models.sharding import ModelSharding, check_quantized, make_sharding


@dataclass(frozen=True, slots=True)
class PlatformDefaults:
    """What "auto" becomes."""

    dtype: str
    token_budget: int
    max_num_seqs: int
    max_model_len: int
    small_buckets: tuple[int, ...]
    """Buckets below the token budget beside that of max_num_seqs rows: a step of few rows is
    far cheaper on a CPU, and somewhat on a GPU, which reads the same weights for both."""
    token_budgets: tuple[int, ...]
    """What a time objective may choose from; each is compiled."""
    lays_out_for_gpu: bool = False
    """Whether one device holds the weights as `models.gpu_layout` lays them out."""
    compiler_options: tuple[tuple[str, bool], ...] = ()
    """Of XLA, for the steps."""


CPU_DEFAULTS = PlatformDefaults("float32", 128, 32, 2048, (4,), (32, 64, 128, 256))
ACCELERATOR_DEFAULTS = PlatformDefaults(
    "bfloat16", 512, 256, 8192, (8, 64, 128), (256, 512, 1024, 2048)
)
GPU_DEFAULTS = replace(
    ACCELERATOR_DEFAULTS,
    lays_out_for_gpu=True,
    # cuBLAS's products of few rows were within 3 % of XLA's Triton ones, and compile five times as
    # fast. Without the second, XLA copies each layer's weights out of the stacked ones before it
    # multiplies by them, which takes longer than the product; it can't do it for Triton products.
    compiler_options=(
        ("xla_gpu_enable_triton_gemm", False),
        ("xla_gpu_enable_dynamic_slice_fusion", True),
    ),
)
_DEFAULTS = {"cpu": CPU_DEFAULTS, "gpu": GPU_DEFAULTS}


_ROW_MULTIPLE = 16
"""Rows of a bucket that no flag has named are a multiple of this."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    device: jax.Device
    model_config: ModelConfig
    dtype: np.dtype
    attention: AttentionImplementation
    tiling: AttentionTiling
    scheduler: SchedulerConfig
    one_bucket: bool
    cache_dir: Path
    step_budget: str = "tokens"
    objective: ServiceObjective = DEFAULT_OBJECTIVE
    """Of requests that bring none."""
    has_tbt_objective: bool = False
    """`objective.tbt_s` was asked for, so steps are measured at start."""
    quantization: str | None = None
    """Of the projections' weights, one of `models.ops.quantized.FORMATS`."""
    kv_quantization: str | None = None
    """Of keys and values, one of `kv_quantization.FORMATS`."""
    native: NativeSettings | None = None
    """None where XLA multiplies."""
    loras: LoraSettings | None = None
    """None without room for adapters."""
    sharding: ModelSharding | None = None
    """On more devices than `device`; None on one."""
    lays_out_for_gpu: bool = False
    """See `PlatformDefaults`."""
    compiler_options: tuple[tuple[str, bool], ...] = ()

    @property
    def mesh(self) -> MeshShape:
        return ONE_DEVICE if self.sharding is None else self.sharding.shape

    @property
    def pool_dtype(self) -> np.dtype:
        """Of the KV pool, as it is stored."""
        return storage_dtype(self.dtype, self.kv_quantization)

    @property
    def num_seqs(self) -> int:
        """Requests that run at once, in all replicas."""
        return self.scheduler.max_num_seqs * self.mesh.data

    def abstract_params(self) -> Params:
        """The weights as they are served, as `jax.ShapeDtypeStruct`."""
        if self.native is not None:
            return _native_shapes(self.model_config, self.dtype, self.native)
        shapes = _served_shapes(self.model_config, self.dtype, self.quantization, self.sharding)
        return shapes_on_gpu(shapes) if self.lays_out_for_gpu else shapes

    def abstract_adapters(self, num_adapters: int | None = None) -> AdapterPool | None:
        """The pool of adapters, or one of so many places, as `jax.ShapeDtypeStruct`; None without
        room for any."""
        if self.loras is None:
            return None
        return _adapter_shapes(
            self.model_config, self.dtype, self.loras, self.sharding, num_adapters
        )

    def adapter_on_host(self) -> AdapterPool | None:
        """A pool of one place before it is laid out on a mesh, as `jax.ShapeDtypeStruct`."""
        if self.loras is None:
            return None
        return pool_shapes(self.model_config, self.dtype, 1, self.loras.max_rank)

    def layouts(self) -> tuple[StepLayout, ...]:
        """One static layout per bucket."""
        scheduler = self.scheduler
        return tuple(
            StepLayout(
                num_rows=rows,
                num_slots=scheduler.max_num_seqs,
                num_sample_rows=scheduler.max_sample_rows(rows),
                page_table_width=self.tiling.page_table_width(scheduler.max_pages_per_seq),
                num_pages=scheduler.num_pages,
                vocab_size=self.model_config.vocab_size,
                tiling=self.tiling,
                decodes_as_tiles=self.one_bucket,
            )
            for rows in scheduler.buckets
        )


def resolve_settings(
    config: EngineConfig,
    model_config: ModelConfig,
    device: jax.Device,
    file_kinds: FileKinds | None = None,
) -> EngineSettings:
    """Fills in every "auto". A mesh takes the first devices of `device`'s platform.

    Args:
        config: what was asked for.
        model_config: of the model.
        device: on which it runs.
        file_kinds: of the file's codes, for `weights_format` "native".

    Raises ConfigError or MeshError naming the flag to change.
    """
    defaults = _DEFAULTS.get(device.platform, ACCELERATOR_DEFAULTS)
    dtype = jnp.dtype(defaults.dtype if config.dtype == "auto" else config.dtype)
    model_limit = model_config.max_position_embeddings
    max_model_len = config.max_model_len or min(model_limit, defaults.max_model_len)
    if max_model_len > model_limit:
        raise ConfigError(
            f"--max-model-len {max_model_len} is beyond the model's own limit of {model_limit}"
        )
    model_config = model_config.for_context(max_model_len)
    token_budget, max_num_seqs, buckets = _resolve_rows(config, defaults)
    quantization = None if config.quantization == "none" else config.quantization
    sharding = None
    if config.mesh.num_devices > 1:
        sharding = make_sharding(model_config, config.mesh, jax.devices(device.platform))
    native = resolve_native(config, model_config, device, dtype, file_kinds)
    attention = _attention(config, device, native)
    kv_quantization = _kv_quantization(config, attention)
    loras = resolve_loras(config)
    weights_bytes = bytes_per_device(
        _served_shapes(model_config, dtype, quantization, sharding)
        if native is None
        else _native_shapes(model_config, dtype, native)
    )
    if loras is not None:
        adapters = _adapter_shapes(model_config, dtype, loras, sharding)
        weights_bytes += bytes_per_device(adapters)
    num_pages = choose_num_pages(
        model_config if sharding is None else sharding.served_config,
        page_size=config.page_size,
        dtype=storage_dtype(dtype, kv_quantization),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=config.kv_cache_bytes,
        weights_bytes=weights_bytes,
        device=device,
        mesh=config.mesh,
    )
    scheduler = SchedulerConfig(
        num_pages=num_pages,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        buckets=buckets,
        page_size=config.page_size,
        watermark=config.watermark,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        prefix_caching=config.prefix_caching,
        policy=config.policy,
        speculation=_speculation(
            config, may_grow_step=native is not None or device.platform != "cpu"
        ),
        **_pipelining(config.mesh.stage, max_num_seqs),
    )
    scheduler = _with_policy_rows(scheduler, config)
    return EngineSettings(
        device=device,
        model_config=model_config,
        dtype=dtype,
        attention=attention,
        tiling=attention.choose_tiling(
            config.page_size, model_config.num_heads, model_config.num_kv_heads
        ),
        scheduler=scheduler,
        one_bucket=len(scheduler.buckets) == 1,
        step_budget=config.step_budget,
        objective=_objective(config),
        has_tbt_objective=config.slo_tbt_ms is not None,
        quantization=quantization,
        kv_quantization=kv_quantization,
        native=native,
        loras=loras,
        sharding=sharding,
        # On a mesh a device's columns of the three are not side by side in the whole matrix.
        lays_out_for_gpu=defaults.lays_out_for_gpu and sharding is None,
        compiler_options=defaults.compiler_options,
        cache_dir=config.compilation_cache_dir or default_root() / "xla",
    )


def _speculation(config: EngineConfig, *, may_grow_step: bool) -> SpeculationConfig | None:
    """Raises ConfigError for what is out of bounds or does not go with it."""
    if config.speculative_method == "none":
        return None
    if config.step_budget != "tokens":
        raise ConfigError(
            f"--speculative-method does not work with --step-budget {config.step_budget}, which "
            "does not know what drafts take: leave one of the two out"
        )
    auto = SpeculationConfig()
    lookup_max, lookup_min = config.prompt_lookup_max, config.prompt_lookup_min
    if lookup_max is None:
        lookup_max = max(auto.lookup_max, lookup_min or 0)
    return SpeculationConfig(
        num_tokens=_or_auto(config.num_speculative_tokens, auto.num_tokens),
        lookup_max=lookup_max,
        lookup_min=_or_auto(lookup_min, min(auto.lookup_min, lookup_max)),
        may_grow_step=may_grow_step,
    )


def _or_auto(asked: int | None, auto: int) -> int:
    return auto if asked is None else asked


def _kv_quantization(config: EngineConfig, attention: AttentionImplementation) -> str | None:
    if config.kv_cache_dtype == "auto":
        return None
    if not attention.takes_quantized_pool:
        raise ConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype} is not available with --attention "
            f"{attention.name}: leave it out, or choose --attention reference, which is slower"
        )
    return config.kv_cache_dtype


class _Pipelining(TypedDict, total=False):
    """Fields of `SchedulerConfig`."""

    max_in_flight: int
    chain_decodes: bool
    stream_chunks: bool
    max_seqs_per_step: int


def _pipelining(num_stages: int, max_num_seqs: int) -> _Pipelining:
    """A micro-batch for each stage; without stages the defaults."""
    if num_stages == 1:
        return {}
    return {
        "max_in_flight": num_stages,
        "chain_decodes": False,
        "stream_chunks": True,
        "max_seqs_per_step": -(-max_num_seqs // num_stages),
    }


def _compute_capability(device: jax.Device) -> int:
    """90 for an H100; 0 for what is no NVIDIA GPU."""
    return round(10 * float(getattr(device, "compute_capability", 0)))


def _served_shapes(
    model_config: ModelConfig,
    dtype: np.dtype,
    quantization: str | None,
    sharding: ModelSharding | None,
) -> Params:
    """Raises FormatError if the model cannot be quantised so, MeshError if not on this mesh."""
    abstract = get_family(model_config.family).abstract_params(model_config, dtype)
    if quantization is not None:
        check_quantizable(model_config, abstract, quantization)
    abstract = quantized_shapes(abstract, quantization)
    if sharding is None:
        return abstract
    if quantization is not None:
        check_quantized(model_config, sharding.shape, quantization)
    return sharding.abstract_params(abstract)


def _adapter_shapes(
    model_config: ModelConfig,
    dtype: np.dtype,
    loras: LoraSettings,
    sharding: ModelSharding | None,
    num_adapters: int | None = None,
) -> AdapterPool:
    """Raises FormatError if the model can have no adapters beside it."""
    shapes = pool_shapes(model_config, dtype, num_adapters or loras.max_loras, loras.max_rank)
    return shapes if sharding is None else sharding.abstract_params(shapes)


def _native_shapes(model_config: ModelConfig, dtype: np.dtype, native: NativeSettings) -> Params:
    abstract = get_family(model_config.family).abstract_params(model_config, dtype)
    return native_shapes(abstract, model_config, native.kind_of)


def _resolve_rows(
    config: EngineConfig, defaults: PlatformDefaults
) -> tuple[int, int, tuple[int, ...]]:
    """Token budget, slots and buckets."""
    asked = config.buckets
    if isinstance(asked, tuple):
        token_budget = config.token_budget or asked[-1]
    else:
        token_budget = config.token_budget or max(defaults.token_budget, config.max_num_seqs or 0)
    if config.slo_tbt_ms is not None and config.token_budget is None and asked == "auto":
        token_budget = defaults.token_budgets[-1]
    max_num_seqs = config.max_num_seqs or min(defaults.max_num_seqs, token_budget)
    if isinstance(asked, tuple):
        return token_budget, max_num_seqs, asked
    if asked == "one":
        return token_budget, max_num_seqs, (token_budget,)
    if config.slo_tbt_ms is not None:
        larger = tuple(rows for rows in defaults.token_budgets if rows > max_num_seqs)
        defaults = replace(defaults, small_buckets=(*defaults.small_buckets, *larger))
    sizes = {rows for rows in (*defaults.small_buckets, max_num_seqs) if rows < token_budget}
    return token_budget, max_num_seqs, (*sorted(sizes), token_budget)


def _with_policy_rows(scheduler: SchedulerConfig, config: EngineConfig) -> SchedulerConfig:
    """Adds the bucket that the policy's largest step needs, and some on the way to it.

    Raises ConfigError if the buckets were given and have none, or if the
    policy can't keep the objective that was asked for.
    """
    policy = make_policy(scheduler.policy)
    if config.slo_tbt_ms is not None and not policy.rules.sizes_chunks:
        raise ConfigError(
            f"--slo-tbt-ms has no effect on --policy {policy.name}, which does not cut prompts to "
            "fit a step beside its decodes: leave it out, or choose --policy sarathi"
        )
    num_rows = policy.max_step_rows(scheduler)
    if config.buckets != "auto" or num_rows <= scheduler.buckets[-1]:
        policy.check(scheduler)
        return scheduler
    num_rows = -(-num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    buckets = list(scheduler.buckets)
    while 5 * buckets[-1] < num_rows:
        buckets.append(4 * buckets[-1])
    return replace(
        scheduler, buckets=(*buckets, num_rows), token_budget=config.token_budget or num_rows
    )


def _attention(
    config: EngineConfig, device: jax.Device, native: NativeSettings | None
) -> AttentionImplementation:
    """Raises ConfigError if the platform hasn't got what was asked for."""
    name = config.attention
    # The native kernels know no pool in 8 bits.
    if name == "auto" and native is not None and config.kv_cache_dtype == "auto":
        name = "native"
    if name == "native" and native is None:
        raise ConfigError(
            "--attention native runs with the native kernels alone: choose --kernels native, or "
            "leave --attention out"
        )
    try:
        return select(name, device.platform, _compute_capability(device))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _objective(config: EngineConfig) -> ServiceObjective:
    ttft_ms, tbt_ms = config.slo_ttft_ms, config.slo_tbt_ms
    return ServiceObjective(
        ttft_s=DEFAULT_OBJECTIVE.ttft_s if ttft_ms is None else ttft_ms / 1e3,
        tbt_s=DEFAULT_OBJECTIVE.tbt_s if tbt_ms is None else tbt_ms / 1e3,
    )
