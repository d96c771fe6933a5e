"""Latency of the scheduling policies in the real engine: SL1 to SL6 and SL8 on this machine.

    python tools/evaluate_policies.py [--only sl1,sl6] [--operating-point cpu|gpu]
        [--engine-cores N] [--first-cores] [--model FOLDER] [--wait-s N] [--json]
        [--resume FOLDER] [--stop-after-s N] [--seeds 1,2,3] [--num-requests N]

The same engine, model and load; only the policy differs. Each part takes one
to three minutes and ends as pass, fail or void. Void says that the machine was
busy: nothing can be concluded, whether the checks hold or not.

SL3 to SL5 consist of cells, one rate or one budget each. `--resume` keeps those that were
measured on a quiet machine, measures void ones again until `--stop-after-s`, and later only what
is missing, so that a part can be finished in several quiet spells.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tools.policy_evaluation.budget_control import objective_keeps
from tools.policy_evaluation.capacity import socket_capacity
from tools.policy_evaluation.cells import Cells, UnfinishedError
from tools.policy_evaluation.operating_point import CPU, OPERATING_POINTS
from tools.policy_evaluation.piggyback import marginal_decode_cost
from tools.policy_evaluation.placement import place_engine
from tools.policy_evaluation.rig import Rig, make_rig
from tools.policy_evaluation.simulated import simulator_accuracy
from tools.policy_evaluation.slack import slack_throughput
from tools.policy_evaluation.stalls import long_prompt_arrival, time_to_first_token_price
from tools.policy_evaluation.verdict import Outcome, wait_until_quiet

PARTS: dict[str, Callable[[Rig, Cells], Outcome]] = {
    "sl1": lambda rig, _: long_prompt_arrival(rig),
    "sl2": lambda rig, _: time_to_first_token_price(rig),
    "sl3": socket_capacity,
    "sl4": objective_keeps,
    "sl5": slack_throughput,
    "sl6": lambda rig, _: marginal_decode_cost(rig),
    "sl8": lambda rig, _: simulator_accuracy(rig),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--operating-point", choices=OPERATING_POINTS, default=CPU.name)
    parser.add_argument(
        "--engine-cores", type=int, help="cores for steps alone (the operating point's number)"
    )
    parser.add_argument(
        "--first-cores",
        action="store_true",
        help="steps run on the first cores, not on the last: whichever keep their speed",
    )
    parser.add_argument("--model", type=Path, help="where to keep the random model")
    parser.add_argument("--cache", type=Path, help="of compiled programs (the engine's own)")
    parser.add_argument(
        "--wait-s", type=float, default=0.0, help="longest wait for a quiet machine before a part"
    )
    parser.add_argument("--resume", type=Path, help="keeps and takes the cells of sl3, sl4, sl5")
    parser.add_argument(
        "--stop-after-s", type=float, default=math.inf, help="begins no cell later than that"
    )
    parser.add_argument("--seeds", default="1,2,3", help="of sl5")
    parser.add_argument("--num-requests", type=int, default=80, help="in a cell of sl5")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    seeds = tuple(int(seed) for seed in args.seeds.split(","))
    sl5 = partial(slack_throughput, num_requests=args.num_requests, seeds=seeds)
    parts = PARTS | {"sl5": sl5}
    point = OPERATING_POINTS[args.operating_point]
    try:
        placement = place_engine(
            args.engine_cores or point.num_engine_cores, on_first=args.first_cores
        )
    except ValueError as error:
        parser.error(str(error))
    last_start_s = time.monotonic() + args.stop_after_s
    with tempfile.TemporaryDirectory() as scratch:
        rig = make_rig(point, placement, args.model or Path(scratch) / "model", cache=args.cache)
        failed = False
        for name in names:
            if args.wait_s:
                wait_until_quiet(placement.all_cores, args.wait_s)
            try:
                outcome = parts[name](rig, Cells(rig, name, args.resume, last_start_s))
            except UnfinishedError as error:
                failed = True
                print(f"{error}: run it again with the same --resume", file=sys.stderr)
                continue
            failed |= outcome.verdict != "pass"
            if args.json:
                print(json.dumps(outcome.values()), flush=True)
            else:
                _print(outcome)
    sys.exit(failed)


def _print(outcome: Outcome) -> None:
    noise = outcome.noise
    print(f"{outcome.name}: {outcome.verdict.upper()}")
    for check in outcome.checks:
        sign = "<=" if check.at_most else ">="
        mark = "" if check.holds else "   does not hold"
        print(f"    {check.name:44s} {check.value:9.3f} {sign} {check.limit:g}{mark}")
    print(
        f"    calibration spread {noise.calibration_spread:.0%}, other programs "
        f"{noise.foreign_cpu_share:.0%} of the CPU, load {noise.load_average:.1f}"
    )
    for reason in outcome.values()["void_reasons"]:
        print(f"    void: {reason}")
    print(f"    {json.dumps(outcome.figures)}", flush=True)


if __name__ == "__main__":
    main()
