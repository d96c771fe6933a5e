"""Generated schemas through an engine: what came out, and whether it is as it must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from jsonschema import Draft202012Validator

from jaxserve.engine.engine import Engine
from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.request import FinishReason, GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from tools.schema_cases.schemas import Schema, make_schema

MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Case:
    seed: int
    temperature: float
    schema: Schema
    text: str
    num_tokens: int
    finish_reason: FinishReason

    @property
    def is_valid(self) -> bool:
        """The text is JSON that the schema accepts."""
        try:
            value = json.loads(self.text)
        except ValueError:
            return False
        validator = Draft202012Validator(
            self.schema, format_checker=Draft202012Validator.FORMAT_CHECKER
        )
        return bool(validator.is_valid(value))


def run_cases(
    engine: Engine, seeds: Iterable[int], prompt_of: Callable[[Schema], Sequence[int]]
) -> Iterator[Case]:
    """Each schema greedily when its seed is even, and sampled when it is odd.

    Args:
        prompt_of: token ids of the question whose answer the schema constrains.
    """
    seeds = list(seeds)
    schemas = {seed: make_schema(seed) for seed in seeds}
    requests = (
        GenerationRequest(
            f"case-{seed}",
            tuple(prompt_of(schemas[seed])),
            SamplingParams(
                temperature=float(seed % 2),
                seed=seed,
                max_tokens=MAX_TOKENS,
                constraint=Constraint.json_schema(schemas[seed]),
            ),
        )
        for seed in seeds
    )
    for seed, done in zip(seeds, complete_in_order(engine, requests, max_ahead=32), strict=True):
        yield Case(
            seed,
            float(seed % 2),
            schemas[seed],
            done.text,
            len(done.token_ids),
            done.finish_reason,
        )
