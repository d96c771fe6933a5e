"""A process that prepares a file of texts; tests kill it and watch its memory.

    python -m tests.trainer.data.prepare_process SOURCE OUT NUM_WORKERS

Every block is committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.trainer.data.prepare import prepare
from jaxserve.trainer.data.prepare_config import PrepareConfig
from models.tokenizer import Tokenizer


def word_tokenizer() -> Tokenizer:
    """A word is a token: fast, so that a test is about files and not about encoding."""
    vocab = {"<unk>": 0} | {f"word{number}": number + 1 for number in range(1000)}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(backend, eos_token_ids=(backend.token_to_id("<eos>"),))


def main() -> None:
    source, out, num_workers = sys.argv[1:]
    config = PrepareConfig(
        sources=(Path(source),),
        out=Path(out),
        seq_len=128,
        eval_fraction=0.1 if source.endswith(".jsonl") else 0.0,
        num_workers=int(num_workers),
    )
    prepare(config, word_tokenizer(), commit_every_s=0.0)


if __name__ == "__main__":
    main()
