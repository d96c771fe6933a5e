"""Makes examples/train/: a small real text, a tokenizer trained on it, and both prepared.

    python tools/make_example_data.py

Everything it writes is committed; it is run again only to change the example. The text is
seven State of the Union addresses of the corpus `sotu` (public domain), the chats come from
`wordnet-chat`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxserve.trainer.data.prepare import prepare
from jaxserve.trainer.data.prepare_config import PrepareConfig
from models.tokenizer import Tokenizer
from models.tokenizer_files import save_tokenizer
from tools.corpora.catalog import CATALOG
from tools.get_corpus import fetch_corpus

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "train"
CORPORA = ROOT / "build" / "corpora"
PRESIDENTS = ("abraham_lincoln", "john_f_kennedy")
VOCAB_SIZE = 1024
NUM_CHATS = 200
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    speeches = [
        record
        for record in _records(fetch_corpus(CATALOG["sotu"], CORPORA))
        if record["id"].partition("_")[2].rpartition("_")[0] in PRESIDENTS
    ]
    chats = list(_records(fetch_corpus(CATALOG["wordnet-chat"], CORPORA)))
    chats = chats[:: len(chats) // NUM_CHATS][:NUM_CHATS]
    data = EXAMPLE / "data"
    data.mkdir(parents=True, exist_ok=True)
    _write(data / "speeches.jsonl", _paragraphs(speeches))
    _write(data / "chats.jsonl", chats)
    tokenizer = _train(record["text"] for record in speeches)
    folder = EXAMPLE / "tokenizer"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    _prepare(data, tokenizer)


def _paragraphs(speeches: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The speeches have no paragraphs; ten sentences each make documents of a useful size."""
    records = []
    for speech in speeches:
        sentences = speech["text"].split(". ")
        for first in range(0, len(sentences), 10):
            text = ". ".join(sentences[first : first + 10])
            end = "" if text.endswith((".", "!", "?")) else "."
            records.append({"id": f"{speech['id']}_{first // 10}", "text": text + end})
    return records


def _train(texts: Iterable[str]) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, special=True) for text in specials],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, eos_token_ids=(0, 2), chat_template=CHATML)


def _prepare(data: Path, tokenizer: Tokenizer) -> None:
    """What the commands in examples/train/README.md do."""
    for kind, source, seq_len in (("text", "speeches", 64), ("chat", "chats", 256)):
        config = PrepareConfig(
            sources=(data / f"{source}.jsonl",),
            out=data / source,
            seq_len=seq_len,
            kind=kind,
            eval_fraction=0.05,
            force=True,
        )
        manifest = prepare(config, tokenizer)
        for split, sizes in manifest.splits.items():
            print(f"{source} {split}: {sizes.num_examples} rows, {sizes.num_tokens} tokens")


def _records(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
