"""How well a served model predicts a text: perplexity through the real step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import ConfigError

_SCORE = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
_MAX_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one model on one text."""

    num_tokens: int
    """Tokens that were predicted."""
    mean_nll: float
    """Mean negative log-likelihood of a token, in nats."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)


def measure_quality(engine: EngineCore, token_ids: Sequence[int], *, window: int) -> Quality:
    """Scores a text in windows that do not overlap; each window's first token is given.

    Args:
        engine: running; it must take prompts of `window` tokens.
        token_ids: of the text, two at least.
        window: tokens of a window, two at least.

    Raises:
        ConfigError: the text is too short.
    """
    if len(token_ids) < 2:
        raise ConfigError("the text has fewer than two tokens, so there is nothing to predict")
    logprobs = [
        entry.logprob
        for completion in complete_in_order(
            engine, _requests(token_ids, window), max_ahead=_MAX_AHEAD
        )
        for entry in completion.prompt_logprobs
    ]
    return Quality(len(logprobs), -math.fsum(logprobs) / len(logprobs))


def _requests(token_ids: Sequence[int], window: int) -> Iterator[GenerationRequest]:
    for start in range(0, len(token_ids), window):
        part = tuple(token_ids[start : start + window])
        if len(part) > 1:
            yield GenerationRequest(f"window-{start}", part, _SCORE)
