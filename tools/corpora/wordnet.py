"""Chats made from WordNet: real definitions, synonyms and examples; the questions are ours.

File formats: WordNet's wndb(5WN) manual page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS_OF_SPEECH = (
    ("noun", "a noun"),
    ("verb", "a verb"),
    ("adj", "an adjective"),
    ("adv", "an adverb"),
)
SYSTEM_PROMPT = "You are a dictionary. Answer briefly."
MIN_TAGGED_SENSES = 1
"""Words that occur in WordNet's sense-tagged texts: the common ones."""

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Synset:
    """One meaning: its words, its definition, sentences that use it."""

    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


def chats(package: Path) -> Iterator[dict[str, Any]]:
    """A conversation a common word, in the order of the index files: `{"messages": [...]}`."""
    for name, article in PARTS_OF_SPEECH:
        data = (package / "dict" / f"data.{name}").read_bytes()
        for lemma, offset in _common_lemmas(package / "dict" / f"index.{name}"):
            synset = _parse_synset(data, offset)
            yield {"id": f"{lemma}.{name}", "messages": _conversation(lemma, article, synset)}


def _conversation(lemma: str, article: str, synset: Synset) -> list[Message]:
    plain = lemma.replace("_", " ")
    word = next((own for own in synset.words if own.lower() == plain), plain)
    messages = [
        _message("system", SYSTEM_PROMPT),
        _message("user", f'What does "{word}" mean as {article}?'),
        _message("assistant", f"As {article}, {word} means: {synset.definition}."),
    ]
    example = next((text for text in synset.examples if plain in text.lower()), None)
    if example is not None:
        answer = _as_sentence(example)
        messages += [_message("user", "Use it in a sentence."), _message("assistant", answer)]
    others = [other for other in synset.words if other.lower() != plain]
    if others:
        messages += [
            _message("user", "Which other words say the same?"),
            _message("assistant", ", ".join(others) + "."),
        ]
    return messages


def _as_sentence(example: str) -> str:
    text = example.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _common_lemmas(index: Path) -> Iterator[tuple[str, int]]:
    """Lemma and the byte offset of its most frequent meaning, for common lemmas."""
    for line in index.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields = line.split()
        num_pointer_symbols = int(fields[3])
        sense_count, tagged_count, *offsets = fields[4 + num_pointer_symbols :]
        if int(tagged_count) >= MIN_TAGGED_SENSES and int(sense_count) == len(offsets):
            yield fields[0], int(offsets[0])


def _parse_synset(data: bytes, offset: int) -> Synset:
    line = data[offset : data.index(b"\n", offset)].decode("utf-8")
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    num_words = int(fields[3], 16)
    words = [fields[4 + 2 * number] for number in range(num_words)]
    plain = [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in words]
    examples = re.findall(r'"([^"]+)"', gloss)
    definition = re.sub(r';?\s*"[^"]*"[^;]*', "", gloss).strip(" ;")
    return Synset(tuple(plain), definition or gloss.strip(), tuple(examples))
