"""Makes jaxserve/simulator/data/traces.json: quantile tables of public traces.

    python tools/fit_traces.py --traces FOLDER

The folder holds `sharegpt_8k.csv` (microsoft/sarathi-serve, Apache-2.0),
`azure_conv_2023.csv` and `azure_code_2023.csv` (Azure/AzurePublicDataset,
CC-BY). The JSON keeps 14 quantiles of each, no request.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from jaxserve.simulator.workloads import read_trace

OUT = Path(__file__).parents[1] / "jaxserve" / "simulator" / "data" / "traces.json"
LEVELS = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
FILES = {
    "sharegpt": ("sharegpt_8k.csv", "microsoft/sarathi-serve, Apache-2.0"),
    "azure_conv": ("azure_conv_2023.csv", "Azure/AzurePublicDataset (2023), CC-BY"),
    "azure_code": ("azure_code_2023.csv", "Azure/AzurePublicDataset (2023), CC-BY"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the CSVs")
    folder: Path = parser.parse_args().traces
    tables = {}
    for name, (file, source) in FILES.items():
        lengths, arrivals_s = read_trace(folder / file)
        rate = None if arrivals_s is None else round(len(arrivals_s) / arrivals_s[-1], 3)
        prompts, outputs = np.array(lengths).T
        tables[name] = {
            "source": source,
            "num_requests": len(lengths),
            "mean_requests_per_s": rate,
            "spearman": round(_spearman(prompts, outputs), 3),
            "prompt_tokens": np.percentile(prompts, LEVELS).round().astype(int).tolist(),
            "output_tokens": np.percentile(outputs, LEVELS).round().astype(int).tolist(),
        }
    lines = [f"  {json.dumps(name)}: {json.dumps(table)}" for name, table in tables.items()]
    text = (
        f'{{\n "made_by": "tools/fit_traces.py",\n "levels_percent": {json.dumps(LEVELS)},\n'
        ' "tables": {\n' + ",\n".join(lines) + "\n }\n}\n"
    )
    OUT.write_text(text, encoding="utf-8")
    print(text)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; ties keep their order."""
    ranks = [values.argsort().argsort().astype(np.float64) for values in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    return float(
        centred[0] @ centred[1] / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    )


if __name__ == "__main__":
    main()
