"""The engines that can be compared, by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.memory_plan import bytes_per_device
from jaxserve.engine.served_params import file_kinds
from jaxserve.engine.settings import resolve_settings
from models.loading import open_model
from models.registry import get_family
from tools.peers import llama_cpp, our_engine, vllm_cpu
from tools.peers.ceilings import ModelSize
from tools.peers.engine import Engine

NUM_STREAMS = 32
MAX_LEN = 1152
"""The longest request has 1025 tokens."""
KV_CACHE_BYTES = 2_000_000_000

Q4_1, INT8, BFLOAT16 = "jaxserve Q4_1", "jaxserve int8", "jaxserve bf16"
Q4_1_BUCKETS, XLA = "jaxserve Q4_1 buckets", "jaxserve XLA"
NAMES = ("llama.cpp", "vLLM", Q4_1, Q4_1_BUCKETS, INT8, BFLOAT16, XLA)
PAIRS = (
    (Q4_1, "llama.cpp"),
    (Q4_1_BUCKETS, "llama.cpp"),
    (INT8, "llama.cpp"),
    (XLA, "llama.cpp"),
    (BFLOAT16, "vLLM"),
    # vLLM's weights are those of the GGUF file but for their rounding to bfloat16.
    (XLA, "vLLM"),
)
"""Ours beside a peer."""


@dataclass(frozen=True, slots=True)
class OurVariant:
    """A way in which we serve the model."""

    uses_gguf: bool
    weights: str
    compute: str
    dtype: str
    extra: tuple[str, ...] = ()
    """More options of `jaxserve`."""

    @property
    def options(self) -> tuple[str, ...]:
        """Of `jaxserve`."""
        return ("--dtype", self.dtype, *self.extra)


OURS = {
    Q4_1: OurVariant(True, "GGUF Q4_1", "int8 x 4 bits", "float32", ("--weights-format", "native")),
    # A step of 1 or 8 rows has a program of its own.
    Q4_1_BUCKETS: OurVariant(
        True,
        "GGUF Q4_1",
        "int8 x 4 bits",
        "float32",
        ("--weights-format", "native", "--buckets", "1,8,32,128"),
    ),
    INT8: OurVariant(True, "int8 from Q4_1", "int8", "float32", ("--quantization", "int8")),
    BFLOAT16: OurVariant(False, "bfloat16", "bfloat16", "bfloat16"),
    XLA: OurVariant(True, "float32 from Q4_1", "float32", "float32", ("--kernels", "xla")),
}


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Makes engines; a peer's environment is installed when it is first asked for."""

    gguf: Path
    folder: Path
    """Of environments, caches and the converted model."""
    torch_index: str | None
    num_threads: int

    @property
    def safetensors(self) -> Path:
        return self.folder / "model-bf16"

    def model_of(self, name: str) -> Path:
        """The weights that an engine serves, converted if need be."""
        if name == "llama.cpp" or (name in OURS and OURS[name].uses_gguf):
            return self.gguf
        if not self.safetensors.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "jaxserve", "checkpoint", "convert"]
            command += [str(self.gguf), str(self.safetensors)]
            subprocess.run([*command, "--to", "safetensors", "--dtype", "bfloat16"], check=True)
        return self.safetensors

    def make(self, name: str) -> Engine:
        """Raises KeyError for a name that is not in `NAMES`."""
        makers: dict[str, Callable[[], Engine]] = {
            "llama.cpp": self._llama_cpp,
            "vLLM": self._vllm,
            **{ours: lambda ours=ours: self._ours(ours) for ours in OURS},  # type: ignore[misc]
        }
        return makers[name]()

    def _llama_cpp(self) -> Engine:
        return llama_cpp.make_engine(
            self.folder,
            self.gguf,
            num_threads=self.num_threads,
            num_streams=NUM_STREAMS,
            max_len=MAX_LEN,
        )

    def _vllm(self) -> Engine:
        return vllm_cpu.make_engine(
            self.folder,
            self.model_of("vLLM"),
            torch_index=self.torch_index,
            num_threads=self.num_threads,
            num_streams=NUM_STREAMS,
            max_len=MAX_LEN,
        )

    def _ours(self, name: str) -> Engine:
        variant, model = OURS[name], self.model_of(name)
        kv_cache = ("--kv-cache-bytes", str(KV_CACHE_BYTES))
        return our_engine.make_engine(
            name,
            model,
            (*variant.options, *kv_cache),
            weights=variant.weights,
            compute=variant.compute,
            weights_bytes=weights_bytes(model, variant.options),
            kv_value_bytes=2 if variant.dtype == "bfloat16" else 4,
            num_streams=NUM_STREAMS,
            max_len=MAX_LEN,
        )


def weights_bytes(model: Path, options: tuple[str, ...]) -> int:
    """Of what a step reads of them, as we hold them with these options."""
    fields = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(options[::2], options[1::2], strict=True)
        if name != "--buckets"
    }
    config = EngineConfig(model=str(model), kv_cache_bytes=KV_CACHE_BYTES, **fields)  # type: ignore[arg-type]
    source = open_model(model)
    kinds = file_kinds(config, source)
    settings = resolve_settings(config, source.config, jax.devices()[0], kinds)
    abstract = dict(settings.abstract_params())
    if settings.native is not None or not source.config.tie_word_embeddings:
        # There is a head beside the table, of which a step reads single rows.
        del abstract["embed"]
    return bytes_per_device(abstract)


def model_size(gguf: Path) -> ModelSize:
    """Counted in the shapes of the weights."""
    config = open_model(gguf).config
    abstract = get_family(config.family).abstract_params(config, "float32")
    layers = jax.tree.leaves(abstract["layers"])
    return ModelSize(
        # Norms have one axis beside that of the layers; they are no products.
        num_layer_weights=sum(leaf.size for leaf in layers if leaf.ndim > 2),
        num_head_weights=config.vocab_size * config.hidden_size,
        num_layers=config.num_layers,
        attention_width=config.num_heads * config.head_dim,
        kv_width=config.num_kv_heads * config.head_dim,
    )
