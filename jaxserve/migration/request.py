"""What is asked of a conversion, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint.formats.gguf_blocks import WRITABLE
from jaxserve.errors import ConfigError

FORMATS = ("safetensors", "gguf", "orbax")
DTYPES = ("float32", "bfloat16", "float16")
LAYERS = ("scanned", "unscanned")
MIN_WINDOW_BYTES = 1 << 20
MAX_WINDOW_BYTES = 64 << 20
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ConversionRequest:
    """One conversion.

    Raises:
        ConfigError: the message names the option and the fix.
    """

    target: Path
    to: str
    """"safetensors", "gguf" or "orbax"."""
    dtype: str | None = None
    """Of floating-point arrays; None keeps each one's own."""
    quantization: str | None = None
    """Of a GGUF file's matrices."""
    layers: str = "scanned"
    """How "orbax" stores them: stacked, or one array a layer."""
    window_bytes: int = MAX_WINDOW_BYTES
    """The aim for the memory of one piece of work."""
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    lora: Path | None = None
    """Adapter folder to merge into the weights."""
    config: Path | None = None
    """Folder with the config of a checkpoint that Orbax wrote by itself."""

    def __post_init__(self) -> None:
        _one_of("--to", self.to, FORMATS)
        if self.dtype is not None:
            _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--layers", self.layers, LAYERS)
        if self.quantization is not None:
            _one_of("--quantization", self.quantization, WRITABLE)
            if self.to != "gguf":
                raise ConfigError(
                    f"--quantization is for --to gguf; with --to {self.to} use --dtype"
                )
            if self.dtype is not None:
                raise ConfigError("--quantization and --dtype say the same of a GGUF: give one")
        if self.layers == "unscanned" and self.to != "orbax":
            raise ConfigError(f"--layers unscanned is for --to orbax, not {self.to}")
        if self.to == "gguf" and self.target.suffix.lower() != ".gguf":
            raise ConfigError(f"{self.target}: the target of --to gguf is a file NAME.gguf")
        if self.to != "gguf" and self.target.suffix.lower() == ".gguf":
            raise ConfigError(f"{self.target}: the target of --to {self.to} is a folder")
        if self.window_bytes < MIN_WINDOW_BYTES:
            raise ConfigError(
                f"--memory-budget leaves windows of {self.window_bytes} bytes; at least "
                f"{MIN_WINDOW_BYTES} are needed"
            )
        if self.max_shard_bytes < 1:
            raise ConfigError("--max-shard-bytes must be at least 1")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option} {value!r} is not one of {', '.join(allowed)}")
