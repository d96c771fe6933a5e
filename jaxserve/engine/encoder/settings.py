"""EncoderSettings: an EngineConfig resolved for one encoder on one device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.encoder.plan import EncodeBucket
from jaxserve.engine.encoder.text_model import BertTextModel, TextModel
from jaxserve.errors import ConfigError
from jaxserve.model_store import default_root
from jaxserve.xc.served import ServedClassifier
from models.encoder_loading import Encoder

ENCODER_FIELDS = (
    *("model", "dtype", "token_budget", "buckets", "max_model_len"),
    *("max_queued_requests", "max_queued_tokens", "compilation_cache_dir"),
)
"""Fields of EngineConfig that an encoder has a use for."""

SHORTEST_POSITIONS = 32
"""Of the shortest step: below it, a step costs little more than its weights."""


@dataclass(frozen=True, slots=True)
class EncoderDefaults:
    """What "auto" becomes."""

    dtype: str
    token_budget: int
    max_in_flight: int
    """A CPU gains nothing from a second step in flight, and the texts that come
    meanwhile share the next one."""


CPU_DEFAULTS = EncoderDefaults("float32", 512, 1)
ACCELERATOR_DEFAULTS = EncoderDefaults("bfloat16", 8192, 2)


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    device: jax.Device
    model: TextModel
    dtype: np.dtype
    max_tokens: int
    """Most tokens of a text."""
    token_budget: int
    buckets: tuple[EncodeBucket, ...]
    max_in_flight: int
    max_queued_requests: int
    max_queued_tokens: int
    cache_dir: Path

    @property
    def max_texts(self) -> int:
        """Most texts of a step."""
        return max(bucket.num_texts for bucket in self.buckets)


def resolve_encoder_settings(
    config: EngineConfig, encoder: Encoder | ServedClassifier, device: jax.Device
) -> EncoderSettings:
    """Fills in every "auto". Raises ConfigError naming the flag to change, also for
    one that an encoder has no use for."""
    _refuse_unused(config)
    defaults = CPU_DEFAULTS if device.platform == "cpu" else ACCELERATOR_DEFAULTS
    max_tokens = config.max_model_len or encoder.max_tokens
    if max_tokens > encoder.max_tokens:
        raise ConfigError(
            f"--max-model-len {max_tokens} is beyond the {encoder.max_tokens} tokens that the "
            "model's files allow"
        )
    token_budget = config.token_budget or max(defaults.token_budget, max_tokens)
    if token_budget < max_tokens:
        raise ConfigError(
            f"--token-budget {token_budget} does not hold one text of {max_tokens} tokens: raise "
            "it, or lower --max-model-len"
        )
    return EncoderSettings(
        device=device,
        model=text_model_of(encoder),
        dtype=jnp.dtype(defaults.dtype if config.dtype == "auto" else config.dtype),
        max_tokens=max_tokens,
        token_budget=token_budget,
        buckets=_buckets(config, max_tokens, token_budget),
        max_in_flight=defaults.max_in_flight,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        cache_dir=config.compilation_cache_dir or default_root() / "xla",
    )


def text_model_of(encoder: Encoder | ServedClassifier) -> TextModel:
    """What the encoder's steps compute."""
    if isinstance(encoder, ServedClassifier):
        return encoder.model
    return BertTextModel(encoder.config, encoder.normalizes)


def _refuse_unused(config: EngineConfig) -> None:
    unused = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(EngineConfig)
        if field.name not in ENCODER_FIELDS and getattr(config, field.name) != field.default
    ]
    if unused:
        raise ConfigError(
            f"{config.model} is an encoder, which has no use for {', '.join(unused)}: leave it out"
        )


def _buckets(config: EngineConfig, max_tokens: int, token_budget: int) -> tuple[EncodeBucket, ...]:
    """Lengths double up to the longest; each for one text, and for as many as the
    budget holds. "one": a single step."""
    if isinstance(config.buckets, tuple):
        raise ConfigError(
            "--buckets takes no row counts for an encoder, whose steps follow from --token-budget "
            "and --max-model-len: give auto or one"
        )
    if config.buckets == "one":
        return (EncodeBucket(token_budget // max_tokens, max_tokens),)
    lengths = [max_tokens]
    length = SHORTEST_POSITIONS
    while length < max_tokens:
        lengths.append(length)
        length *= 2
    shapes = {(number, length) for length in lengths for number in (1, token_budget // length)}
    ordered = sorted(shapes, key=lambda shape: (shape[1], shape[0]))
    return tuple(EncodeBucket(*shape) for shape in ordered)
