"""Make an adapter with `peft` for a tiny model, and the logits that the two give together.

    python3 -m venv goldens-env
    goldens-env/bin/pip install -r requirements/goldens.in
    goldens-env/bin/python tools/make_lora_goldens.py tests/goldens/tiny/biases tests/goldens/lora

The folder gets peft's own files and `logits.npz` with `token_ids int32[T]` and
`logits float32[T, V]`. The same versions give the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

NUM_TOKENS = 24
STDDEV = 0.3
"""Large enough that the adapters change the logits visibly."""


def main() -> None:
    """Write the adapter, the logits, and which versions made them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("out", type=Path, help="folder to replace")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        args.base, attn_implementation="eager", dtype=torch.float32
    )
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * STDDEV)
        token_ids = torch.randint(0, base.config.vocab_size, (NUM_TOKENS,))
        logits = model(token_ids[None]).logits[0].numpy()
    shutil.rmtree(args.out, ignore_errors=True)
    model.save_pretrained(args.out)
    (args.out / "README.md").unlink(missing_ok=True)
    config_file = args.out / "adapter_config.json"
    fields = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(fields | {"base_model_name_or_path": ""}, indent=2) + "\n")
    np.savez_compressed(
        args.out / "logits.npz", token_ids=token_ids.numpy().astype(np.int32), logits=logits
    )
    versions = {module.__name__: module.__version__ for module in (peft, torch, transformers)}
    (args.out / "made_with.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
