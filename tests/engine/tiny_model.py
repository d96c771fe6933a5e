"""A Hugging Face folder of a tiny Llama whose tokens are bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.engine.tiny_tokenizers import byte_tokenizer

WEIGHTS = Path(__file__).parents[1] / "goldens" / "tiny" / "tied"
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tiny_model(folder: Path, *, chat: bool = True) -> Path:
    """Random weights of the goldens, V = 257, context of 64 tokens."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(WEIGHTS / name, folder / name)
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>"} | ({"chat_template": CHAT_TEMPLATE} if chat else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
