"""Generated JSON schemas through a model: what ends by itself must fit its schema.

    python tools/validate_schemas.py                       # the default model, 500 schemas
    python tools/validate_schemas.py --model ./model --num-schemas 50
    python tools/validate_schemas.py --weights-format native
    python tools/validate_schemas.py --cases cases.jsonl   # goes on where an earlier run stopped

The model is shown two short answers to other schemas, then the schema, as whoever wants good
answers does; `--prompt schema` leaves the two out, `--prompt blind` only asks for JSON. Schemas
with even numbers are answered greedily, those with odd ones sampled at temperature 1. Prints
counts; exit code 1 if an answer that stopped does not fit, or less than 95 % stopped within 512
tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxserve.engine.config import WEIGHT_FORMATS, EngineConfig
from jaxserve.engine.request import FinishReason
from jaxserve.engine.startup import start_engine
from models.tokenizer import Tokenizer
from tools.schema_cases.cases import MAX_TOKENS, Case, run_cases
from tools.schema_cases.schemas import Schema

LEAST_STOPPED = 0.95
BLIND_QUESTION = "Answer with a JSON value."
QUESTION = "Answer with a JSON value that this JSON schema accepts, as short as you can:\n\n"
_NODE = {
    "type": "object",
    "properties": {
        "count": {"type": "number"},
        "tail": {"anyOf": [{"$ref": "#/$defs/item"}, {"type": "null"}]},
    },
    "required": ["count", "tail"],
}
EXAMPLES: tuple[tuple[Schema, Any], ...] = (
    (
        {"type": "object", "properties": {"name": {"type": "string"}, "price": {"type": "number"}}},
        {"name": "tea", "price": 2.5},
    ),
    (
        {"$defs": {"item": _NODE}, "$ref": "#/$defs/item"},
        {"count": 0.5, "tail": {"count": 3, "tail": None}},
    ),
)
"""Schemas that are not among those that are asked, and answers to them."""


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=EngineConfig().model)
    parser.add_argument("--weights-format", default="float", choices=WEIGHT_FORMATS)
    parser.add_argument("--num-schemas", type=int, default=500)
    parser.add_argument("--prompt", default="examples", choices=("examples", "schema", "blind"))
    parser.add_argument("--cases", type=Path, metavar="FILE", help="a line of JSON for each answer")
    arguments = parser.parse_args()
    records = _read(arguments.cases)
    missing = [seed for seed in range(arguments.num_schemas) if seed not in records]
    config = EngineConfig(
        arguments.model,
        weights_format=arguments.weights_format,
        max_model_len=4 * MAX_TOKENS,
    )
    running = start_engine(config)
    start = time.perf_counter()
    try:
        prompt_of = partial(prompt_ids, running.tokenizer, arguments.prompt)
        for case in run_cases(running.engine, missing, prompt_of):
            records[case.seed] = _record(case)
            _append(arguments.cases, records[case.seed])
        compiles = running.engine.snapshot().compiles_after_ready
    finally:
        running.close()
    cases = [records[seed] for seed in range(arguments.num_schemas)]
    stopped = [case for case in cases if case["stopped"]]
    invalid = [case for case in stopped if not case["valid"]]
    report = {
        "num_schemas": len(cases),
        "num_stopped": len(stopped),
        "share_stopped": len(stopped) / len(cases),
        "num_stopped_greedy": sum(not case["temperature"] for case in stopped),
        "num_stopped_sampled": sum(bool(case["temperature"]) for case in stopped),
        "num_invalid": len(invalid),
        "invalid_seeds": [case["seed"] for case in invalid],
        "cut_seeds": [case["seed"] for case in cases if not case["stopped"]],
        "num_tokens": sum(case["num_tokens"] for case in cases),
        "compiles_after_ready": compiles,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report, indent=2))
    return int(bool(invalid) or len(stopped) < LEAST_STOPPED * len(cases))


def prompt_ids(tokenizer: Tokenizer, kind: str, schema: Schema) -> Sequence[int]:
    """Token ids of the question for an answer that the schema accepts; `kind` as of `--prompt`."""
    turns = []
    if kind == "examples":
        for known, answer in EXAMPLES:
            turns.append({"role": "user", "content": _question(known)})
            turns.append({"role": "assistant", "content": json.dumps(answer)})
    turns.append(
        {"role": "user", "content": BLIND_QUESTION if kind == "blind" else _question(schema)}
    )
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat(turns)
    return tokenizer.encode("\n\n".join(turn["content"] for turn in turns))


def _question(schema: Schema) -> str:
    return QUESTION + json.dumps(schema, ensure_ascii=False)


def _record(case: Case) -> dict[str, Any]:
    return {
        "seed": case.seed,
        "temperature": case.temperature,
        "stopped": case.finish_reason is FinishReason.STOP,
        "valid": case.is_valid,
        "num_tokens": case.num_tokens,
        "text": case.text,
    }


def _read(path: Path | None) -> dict[int, dict[str, Any]]:
    """Answers of an earlier run, by seed."""
    if path is None or not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["seed"]: record for record in records}


def _append(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
