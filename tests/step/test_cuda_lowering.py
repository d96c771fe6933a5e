"""The steps for NVIDIA GPUs, lowered on a machine without one.

Triton compiles the kernels to PTX, and JAX lowers the step around them for CUDA. What takes JAX's
CUDA plugin, packing a kernel for its handler, is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import pytest

from jaxserve.engine.compilation import trace_step
from jaxserve.engine.startup import program_spec
from models.ops.attention.registry import triton_implementation
from models.ops.attention.triton_attention import TritonAttention
from models.ops.attention.triton_call import HANDLER, CompiledKernel, triton_call
from tests.step.harness import TINY, tiny_settings

CONFIG = replace(TINY, head_dim=64, max_position_embeddings=1024)
DECODE_ROWS, HYBRID_ROWS = 4, 24
KERNELS = {"write_kernel", "decode_kernel", "merge_kernel", "tile_kernel"}


@pytest.mark.parametrize(
    ("compute_capability", "target"),
    [pytest.param(80, "sm_80", marks=pytest.mark.long), (90, "sm_90a")],
)
def test_decode_and_hybrid_steps_lower_for_cuda(compute_capability: int, target: str) -> None:
    pytest.importorskip("triton", reason="only Linux has it")
    kernels: dict[str, str] = {}

    def keep(compiled: CompiledKernel, types: Sequence[str], *_: object) -> bytes:
        # PTX names the parameters that the handler passes, and Triton's two own ones.
        assert len(re.findall(r"\.param \.u64", compiled.ptx)) == len(types) + 2
        kernels[compiled.name] = compiled.ptx
        return compiled.name.encode()

    attention = triton_implementation(
        TritonAttention(compute_capability, call=partial(triton_call, make_record=keep))
    )
    settings = tiny_settings(
        buckets=(DECODE_ROWS, HYBRID_ROWS),
        max_num_seqs=4,
        max_model_len=1024,
        page_size=16,
        config=CONFIG,
    )
    settings = replace(
        settings,
        dtype=jnp.dtype("bfloat16"),
        attention=attention,
        tiling=attention.choose_tiling(16, CONFIG.num_heads, CONFIG.num_kv_heads),
        lays_out_for_gpu=True,
    )
    spec = program_spec(settings)
    for layout in spec.layouts:
        text = trace_step(spec, layout).lower(lowering_platforms=("cuda",)).as_text()
        # The layers are scanned, so that each kernel stands in the program once.
        called = re.findall(rf'custom_call @{HANDLER}\(.*?opaque = "(\w+)"', text)
        assert sorted(called) == sorted(KERNELS)
        assert "tf.aliasing_output" in text or "jax.buffer_donor" in text
    assert kernels.keys() == KERNELS
    for name, ptx in kernels.items():
        assert f".target {target}" in ptx, name
