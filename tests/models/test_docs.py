"""docs/models.md lists what is supported: no less, no more."""

from __future__ import annotations

import re
from pathlib import Path

from models import gguf_model, hf_families
from models.registry import FAMILIES

DOCS = Path(__file__).parent.parent.parent / "docs" / "models.md"


def column(number: int) -> list[list[str]]:
    """The code words in one column of the table of families."""
    text = DOCS.read_text(encoding="utf-8")
    (table,) = [part for part in text.split("\n\n") if part.startswith("| family |")]
    rows = table.splitlines()[2:]
    return [re.findall(r"`([^`]+)`", row.strip("|").split("|")[number]) for row in rows]


def test_the_table_is_the_registry() -> None:
    assert [name for (name,) in column(0)] == list(FAMILIES)
    hugging_face = [name for names in column(2) for name in names]
    assert sorted(hugging_face) == sorted(hf_families.ARCHITECTURES)
    assert {name for names in column(3) for name in names} == set(gguf_model.ARCHITECTURES)
