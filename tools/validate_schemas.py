"""Generated JSON schemas through a model: what ends by itself must fit its schema.

    python tools/validate_schemas.py                       # the default model, 500 schemas
    python tools/validate_schemas.py --model ./model --num-schemas 50

Schemas with even numbers are answered greedily, those with odd ones sampled at temperature 1.
Prints counts; exit code 1 if an answer that stopped does not fit, or less than 95 % stopped within
512 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.request import FinishReason
from jaxserve.engine.startup import start_engine
from tools.schema_cases.cases import MAX_TOKENS, run_cases

LEAST_STOPPED = 0.95
QUESTION = "Answer with a JSON value."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=EngineConfig().model)
    parser.add_argument("--num-schemas", type=int, default=500)
    arguments = parser.parse_args()
    running = start_engine(EngineConfig(arguments.model, max_model_len=2 * MAX_TOKENS))
    start = time.perf_counter()
    try:
        tokenizer = running.tokenizer
        if tokenizer.has_chat_template:
            prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
        else:
            prompt = tokenizer.encode(QUESTION)
        cases = list(run_cases(running.engine, range(arguments.num_schemas), tuple(prompt)))
        compiles = running.engine.snapshot().compiles_after_ready
    finally:
        running.close()
    stopped = [case for case in cases if case.finish_reason is FinishReason.STOP]
    invalid = [case for case in stopped if not case.is_valid]
    report = {
        "num_schemas": len(cases),
        "num_stopped": len(stopped),
        "share_stopped": len(stopped) / len(cases),
        "num_invalid": len(invalid),
        "invalid_seeds": [case.seed for case in invalid],
        "cut_seeds": [case.seed for case in cases if case not in stopped],
        "num_tokens": sum(case.num_tokens for case in cases),
        "compiles_after_ready": compiles,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report, indent=2))
    return int(bool(invalid) or len(stopped) < LEAST_STOPPED * len(cases))


if __name__ == "__main__":
    sys.exit(main())
