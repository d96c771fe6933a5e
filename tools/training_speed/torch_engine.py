"""The training step of transformers' model in PyTorch. Runs in an environment of its own.

    python -m tools.training_speed.torch_engine FOLDER eager|compile NUM_THREADS

`FOLDER` holds `case.json`, `config.json`, `model.safetensors` and `tokens.npy`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from tools.training_speed.case import Case
from tools.training_speed.worker import best_rate, serve

PEAK_SIZE = 2048


def main() -> None:
    """Load, then step on demand."""
    folder, mode, num_threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if torch.version.cuda is not None or "+cpu" not in torch.__version__:
        sys.exit(f"this is torch {torch.__version__}; the CPU build is needed")
    torch.set_num_threads(num_threads)
    case = Case(**json.loads((folder / "case.json").read_text()))
    tokens = torch.from_numpy(np.load(folder / "tokens.npy", allow_pickle=False)).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=case.learning_rate, weight_decay=case.weight_decay, fused=True
    )

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, case.vocab_size), targets)

    loss_fn = torch.compile(loss_of) if mode == "compile" else loss_of

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(inputs, targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    square = torch.ones(PEAK_SIZE, PEAK_SIZE)

    def peak() -> float:
        with torch.no_grad():
            return best_rate(lambda: square @ square, 2.0 * PEAK_SIZE**3)

    serve(step, peak)


if __name__ == "__main__":
    main()
