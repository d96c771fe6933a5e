"""A Triton kernel as part of an XLA program.

Triton compiles the kernel to PTX while JAX traces; JAX's own handler for Triton kernels
(`triton_kernel_call_ffi`, in its CUDA plugin) assembles and launches it, and says that it can be
recorded in CUDA graphs. Neither step needs a GPU, so a program for one can be lowered anywhere.
"""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

HANDLER = "triton_kernel_call_ffi"
WIDE_ALIGNMENT = 16
"""Bytes. Triton needs it for wide loads; XLA aligns arrays that it allocates to more, and the
handler checks it."""

_COMPILING = threading.Lock()
"""Triton's compiler is for one thread at a time; programs are traced in several."""

_TRITON_TYPES = {
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "float16": "*fp16",
    "int32": "*i32",
    "uint16": "*u16",
}
_INDICES = _TRITON_TYPES["int32"]
"""Indices and scalars are loaded one by one. A constant among them lies wherever XLA packed it, so
nothing is promised of them but their own size."""


class TritonMissing(ValueError):
    """Triton, or the part of JAX that launches its kernels, is not installed."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int
    """Depth of the pipeline of loads."""


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    name: str
    ptx: str
    shared_bytes: int
    num_warps: int


def check_installed() -> None:
    """Raises TritonMissing that says what to install."""
    try:  # Both are looked for here, and used elsewhere.
        import triton  # noqa: F401
        from jaxlib.gpu_triton import TritonKernel  # noqa: F401
    except ImportError as error:
        raise TritonMissing(
            f"--attention triton needs Triton and JAX's CUDA plugin ({error}): "
            "install jaxserve[cuda12] or jaxserve[cuda13]"
        ) from error


def launch_record(
    compiled: CompiledKernel,
    types: Sequence[str],
    grid: tuple[int, ...],
    compute_capability: int,
) -> bytes:
    """What the handler reads: the kernel, its grid and its parameters. Needs JAX's CUDA plugin."""
    from jaxlib import gpu_triton

    num_ctas = 1
    no_ttir = ""
    kernel = gpu_triton.TritonKernel(
        compiled.name,
        compiled.num_warps,
        num_ctas,
        compiled.shared_bytes,
        compiled.ptx,
        no_ttir,
        compute_capability,
    )
    no_bytes_to_zero = 0
    int32_bytes = 4
    parameters = [
        gpu_triton.create_array_parameter(
            no_bytes_to_zero, int32_bytes if pointed == _INDICES else WIDE_ALIGNMENT
        )
        for pointed in types
    ]
    x, y, z = (*grid, 1, 1)[:3]
    call = gpu_triton.TritonKernelCall(kernel, x, y, z, parameters)
    no_metadata = b""
    return zlib.compress(call.to_proto(compiled.name, no_metadata))


def triton_call(
    kernel: str,
    arrays: Sequence[jax.Array],
    out_types: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    config: KernelConfig,
    compute_capability: int,
    aliases: Mapping[int, int] | None = None,
    device_capability: int | None = None,
    make_record: Callable[..., bytes] = launch_record,
) -> list[jax.Array]:
    """Runs a kernel of `triton_kernels` over `arrays`.

    Args:
        kernel: its name. Its first arguments are `arrays`, then `out_types`; the rest, by name,
            is `constants`.
        arrays: row-major.
        out_types: of the results, which the kernel gets as uninitialised memory.
        grid: number of programs in up to three dimensions.
        constants: numbers, or names of Triton dtypes.
        config: see there.
        compute_capability: 80 for A100, 90 for H100.
        aliases: argument index to the index of the result that takes its memory.
        device_capability: of the device, where the kernel is compiled for an older one.
        make_record: `launch_record`, or what takes its place where a program is only lowered.
    """
    types = kernel_types([*arrays, *out_types])
    compiled = compile_kernel(
        kernel, types, tuple(sorted(constants.items())), config, compute_capability
    )
    opaque = make_record(compiled, types, grid, device_capability or compute_capability)
    call = jax.ffi.ffi_call(HANDLER, list(out_types), input_output_aliases=dict(aliases or {}))
    return list(call(*arrays, opaque=opaque))


def kernel_types(arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> tuple[str, ...]:
    """Triton's names of pointers to the arrays."""
    return tuple(_TRITON_TYPES[jnp.dtype(array.dtype).name] for array in arrays)


@functools.cache
def compile_kernel(
    kernel: str,
    types: tuple[str, ...],
    constants: tuple[tuple[str, Any], ...],
    config: KernelConfig,
    compute_capability: int,
) -> CompiledKernel:
    """Compiles to PTX, for which neither a GPU nor JAX's CUDA plugin is needed."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.ops.attention import triton_kernels

    function = getattr(triton_kernels, kernel)
    names = function.arg_names
    values = {
        name: getattr(tl, value) if name.endswith("_DTYPE") else value for name, value in constants
    }
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(values, "constexpr")
    source = ASTSource(
        function,
        {name: signature[name] for name in names},
        constexprs=values,
        attrs={
            (index,): [["tt.divisibility", WIDE_ALIGNMENT]]
            for index, pointed in enumerate(types)
            if pointed != _INDICES
        },
    )
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # The variants of a loop must round alike; what is to be fused says so.
        "enable_fp_fusion": False,
    }
    with _COMPILING:
        binary = triton.compile(
            source, target=GPUTarget("cuda", compute_capability, 32), options=options
        )
    metadata = binary.metadata
    return CompiledKernel(metadata.name, binary.asm["ptx"], metadata.shared, metadata.num_warps)
