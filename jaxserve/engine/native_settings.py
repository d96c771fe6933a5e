"""Whether the native CPU kernels multiply, and what they hold the weights as."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError
from models.config import ModelConfig
from models.native_layout import HEAD, check_packable
from models.ops.native import NativeError, is_installed, load_library
from models.ops.packed import Kind

FileKinds = tuple[tuple[str, Kind], ...]
"""Kernel's path, or `models.native_layout.HEAD`, and the kind of the file's codes."""


@dataclass(frozen=True, slots=True)
class NativeSettings:
    instruction_set: str
    num_threads: int
    float_kind: Kind
    """Of kernels that are held in the dtype."""
    is_int8: bool
    """Whether projections are held in 8 bits by --quantization."""
    file_kinds: FileKinds | None
    """Kernels whose codes are the file's; None if the weights are not held so."""

    def kind_of(self, path: str) -> Kind:
        """See `models.native_layout.KindOf`."""
        if self.is_int8 and path != HEAD:
            return Kind.INT8
        return dict(self.file_kinds or ()).get(path, self.float_kind)


def resolve_native(
    config: EngineConfig,
    model_config: ModelConfig,
    device: jax.Device,
    dtype: np.dtype,
    file_kinds: FileKinds | None,
) -> NativeSettings | None:
    """None where XLA multiplies.

    Raises ConfigError, or FormatError for the model, if native kernels are asked for and don't run
    what else is asked for.
    """
    is_asked = config.kernels == "native" or config.weights_format == "native"
    if not is_asked and (config.kernels == "xla" or not is_installed()):
        return None
    problem = _problem(config, device)
    if problem is not None:
        if is_asked:
            raise ConfigError(problem)
        return None
    if model_config.num_experts:
        if is_asked:
            check_packable(model_config)
        return None
    try:
        library = load_library()
    except NativeError as error:
        raise ConfigError(str(error)) from error
    return NativeSettings(
        instruction_set=library.instruction_sets()[0],
        num_threads=library.num_threads,
        float_kind=Kind.FLOAT32 if dtype == np.float32 else Kind.BFLOAT16,
        is_int8=config.quantization == "int8",
        file_kinds=file_kinds if config.weights_format == "native" else None,
    )


def _problem(config: EngineConfig, device: jax.Device) -> str | None:
    """What is asked for that native kernels don't run, and what to do."""
    if config.weights_format == "native" and config.quantization != "none":
        return "--weights-format native keeps the file's own codes: leave --quantization out"
    if config.weights_format == "native" and config.kernels == "xla":
        return "--weights-format native needs --kernels native: XLA does not read a file's codes"
    if device.platform != "cpu":
        return f"the native kernels run on a CPU, not on {device.platform}: choose --kernels xla"
    if config.mesh.num_devices > 1:
        return "the native kernels run on one device: leave --mesh out, or choose --kernels xla"
    if config.quantization == "int4":
        return "the native kernels do not hold --quantization int4: choose int8, or --kernels xla"
    return None
