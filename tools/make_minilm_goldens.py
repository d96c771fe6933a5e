"""Make the goldens of all-MiniLM-L6-v2: the embeddings that `transformers` computes.

Mean of the rows that are not padding, scaled to length one, as the model's card says.

Run it in an environment of its own, see make_smollm2_goldens:

    goldens-env/bin/python tools/make_minilm_goldens.py \
        --model FOLDER --out tests/goldens/minilm.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

LONG = "The tide turns twice a day, and the harbour master writes it down. " * 40
TEXTS = (
    "The capital of France is Paris.",
    "Paris is France's capital city.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Zürich liegt am Zürichsee; où est la bibliothèque ?",
    "人工智能是计算机科学的一个分支。",
    "a",
    "",
    LONG,
)
MAX_TOKENS = 256
"""The last text is longer than what `sentence_bert_config.json` allows."""


def main() -> None:
    """Embed every text, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = transformers.AutoModel.from_pretrained(arguments.model, attn_implementation="eager")
    model = model.float().eval()
    cases = []
    for text in TEXTS:
        batch = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.no_grad():
            mean = model(**batch).last_hidden_state[0].mean(dim=0)
        vector = torch.nn.functional.normalize(mean, dim=0)
        rounded = [round(float(value), 7) for value in vector]
        cases.append({"text": text, "embedding": rounded})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    text = f'{{"made_with": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n'
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
