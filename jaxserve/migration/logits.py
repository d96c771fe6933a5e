"""`--verify logits`: the converted model must say what its source says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.migration.source import SourceModel
from models.decoder import Params
from models.loading import ModelSource, open_model
from models.ops.attention.dense import dense_attend

DEFAULT_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "Water boils at a temperature of",
)
IDS_WITHOUT_TOKENIZER = 16
MAX_PROMPTS_BYTES = 1 << 20


class LogitsApart(JaxserveError):
    """The converted model's logits are not the source's."""


@dataclass(frozen=True)
class Divergence:
    """Over the last tokens of all prompts.

    Attributes:
        max_kl: largest Kullback-Leibler divergence from the source, in nats.
        max_abs: largest difference of two logits.
        num_same_top: prompts whose most likely next token is the same.
        num_prompts: in all.
    """

    max_kl: float
    max_abs: float
    num_same_top: int
    num_prompts: int


@dataclass(frozen=True)
class LogitsCheck:
    """Compares a finished target with its source before it is published.

    Attributes:
        prompts: texts.
        max_kl: most divergence that is allowed, in nats.
    """

    prompts: tuple[str, ...]
    max_kl: float

    @classmethod
    def from_options(cls, prompts: Path | None, max_kl: float, lora: Path | None) -> LogitsCheck:
        """Raises ConfigError for a file that holds no prompts, or a comparison without sense."""
        if lora is not None:
            raise ConfigError("--verify logits compares with SRC, which has no adapter merged in")
        if prompts is None:
            return cls(DEFAULT_PROMPTS, max_kl)
        if not prompts.is_file() or prompts.stat().st_size > MAX_PROMPTS_BYTES:
            raise ConfigError(f"--prompts {prompts}: give a text file of at most 1 MiB")
        lines = tuple(line for line in prompts.read_text("utf-8").splitlines() if line.strip())
        if not lines:
            raise ConfigError(f"--prompts {prompts}: it holds no prompt")
        return cls(lines, max_kl)

    def __call__(self, source: SourceModel, made: Path) -> None:
        """Raises LogitsApart."""
        found = compare_logits(source, open_model(made), self.prompts)
        if not found.max_kl <= self.max_kl:
            raise LogitsApart(
                f"the converted model diverges from its source by up to {found.max_kl:.3g} nats "
                f"(--max-kl {self.max_kl:g}), logits by {found.max_abs:.3g}, with "
                f"{found.num_same_top} of {found.num_prompts} most likely tokens the same. "
                "Nothing was published; raise --max-kl if the format chosen costs that much"
            )


def compare_logits(source: SourceModel, made: ModelSource, prompts: Sequence[str]) -> Divergence:
    """Last-token logits of both models, in float32, on every prompt."""
    ids = _prompt_ids(source, prompts)
    ours = last_logits(source.model, ids)
    theirs = last_logits(made, ids)
    divergences, gaps, same = [], [], 0
    for one, other in zip(ours, theirs, strict=True):
        log_p, log_q = (
            np.asarray(jax.nn.log_softmax(row.astype(np.float64))) for row in (one, other)
        )
        divergences.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        gaps.append(float(np.abs(one - other).max()))
        same += int(one.argmax() == other.argmax())
    # A NaN must not pass for the smallest number.
    worst = float("nan") if np.isnan(divergences).any() else max(divergences)
    return Divergence(worst, max(gaps), same, len(prompts))


def last_logits(model: ModelSource, prompts: Sequence[Sequence[int]]) -> list[npt.NDArray[Any]]:
    """`float32[V]` after each prompt."""
    params = model.load_params(jnp.float32)
    family, config = model.family, model.config

    # The parameters are an argument: closed over they would become part of the program.
    @jax.jit
    def forward(params: Params, token_ids: jax.Array, last: jax.Array) -> jax.Array:
        x = family.embed(params, config, token_ids)
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        x, _ = family.run_layers(params, config, x, positions, (), dense_attend(config))
        return family.logits(params, config, x[last][None])[0]

    # One length for all, so that one program serves them: causal attention ignores the rest.
    longest = max(len(ids) for ids in prompts)
    rows = []
    for ids in prompts:
        padded = np.zeros(longest, np.int32)
        padded[: len(ids)] = ids
        rows.append(np.asarray(forward(params, padded, np.int32(len(ids) - 1))))
    return rows


def _prompt_ids(source: SourceModel, prompts: Sequence[str]) -> list[list[int]]:
    tokenizer = source.load_tokenizer()
    limit = source.config.max_position_embeddings
    if tokenizer is None:
        random = np.random.default_rng(0)
        count = min(IDS_WITHOUT_TOKENIZER, limit)
        return [random.integers(0, source.config.vocab_size, count).tolist() for _ in prompts]
    return [(tokenizer.encode(prompt) or [0])[:limit] for prompt in prompts]
