"""Checks the simulator against published results, band by band.

    python tools/validate_scheduling.py                       # all, 3 seeds
    python tools/validate_scheduling.py --only V1,V9 --seeds 1 --num-requests 300

Prints one line a quantity: its value (the median over the seeds), every seed's
value, the 95 % confidence interval of the mean, the band, and whether the value
lies in it. `docs/results/scheduling.md` explains each of them. Exits with 1 if
one does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tools.scheduling_validation.ablation import v7
from tools.scheduling_validation.capacity_ratios import v1_v2, v3, v4, v5, v5_published, v6
from tools.scheduling_validation.cost_bands import v9, v10, v11
from tools.scheduling_validation.finding import Finding, Settings
from tools.scheduling_validation.long_loads import s10, slack
from tools.scheduling_validation.token_budget import v8

CHECKS: dict[str, Callable[[Settings], list[Finding]]] = {
    "V1": v1_v2,
    "V3": v3,
    "V4": v4,
    "V5-published": v5_published,
    "V5": v5,
    "V6": v6,
    "V7": v7,
    "V8": v8,
    "V9": v9,
    "V10": v10,
    "V11": v11,
    "SL-conv": partial(slack, "azure_conv"),
    "SL-code": partial(slack, "azure_code"),
    "SL-sharegpt": partial(slack, "sharegpt"),
    "S10": s10,
}
"""V1 gives V2 too: both come from the same runs."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CHECKS), help="bands, comma-separated")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--num-requests", type=int, default=1000, help="in each capacity run")
    parser.add_argument("--clip-gaps", type=float, help="cut Poisson gaps at so many means")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="append findings here, as JSON lines")
    args = parser.parse_args()
    failed = 0
    with ProcessPoolExecutor(args.jobs) as pool:
        seeds = tuple(int(seed) for seed in args.seeds.split(","))
        settings = Settings(seeds, args.num_requests, args.clip_gaps, pool)
        for name in args.only.split(","):
            started_s = time.perf_counter()
            findings = CHECKS[name](settings)
            for finding in findings:
                print(finding.line(), flush=True)
                failed += not finding.holds
                if args.out is not None:
                    record = asdict(finding) | {"holds": finding.holds, "seeds": seeds}
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
            print(f"     {name} took {time.perf_counter() - started_s:.0f} s", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
