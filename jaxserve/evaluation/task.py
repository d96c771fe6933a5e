"""Tasks: questions with known answers, one JSON object a line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from jaxserve.errors import ConfigError

TASK_FOLDER = Path(__file__).parent / "tasks"

MAX_CHOICES = 16
MAX_ITEMS = 100_000
_Text = Annotated[str, Field(min_length=1, max_length=100_000)]


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ChoiceItem(_Item):
    """Which of several texts follows: the one that the model finds most likely."""

    context: _Text
    choices: Annotated[list[_Text], Field(min_length=2, max_length=MAX_CHOICES)]
    """Joined to the context as they are, so they begin with the space that there is to be."""
    answer: Annotated[int, Field(ge=0)]
    """Index of the right one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer must be less than {len(self.choices)}, the choices there are")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("choices must differ")
        return self


class ExactItem(_Item):
    """What the model writes, greedily, must be one of the answers."""

    prompt: _Text
    answers: Annotated[list[_Text], Field(min_length=1)]
    """Compared without white space around them, and without regard to case."""
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    stop: list[_Text] = ["\n"]


Item = ChoiceItem | ExactItem


def task_names() -> list[str]:
    """Tasks that come with the package."""
    return sorted(path.stem for path in TASK_FOLDER.glob("*.jsonl"))


def find_task(name: str) -> Path:
    """The file of a task that comes with the package, or one that the user has.

    Raises ConfigError.
    """
    if name in task_names():
        return TASK_FOLDER / f"{name}.jsonl"
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--task {name}: neither a file nor one of the tasks {', '.join(task_names())}"
        )
    return path


def read_task(path: Path) -> list[Item]:
    """The items of a JSONL file. Raises ConfigError naming line and field."""
    items: list[Item] = []
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    items.append(_read_item(line, f"{path}, line {number}"))
                if len(items) > MAX_ITEMS:
                    raise ConfigError(f"{path}: more than {MAX_ITEMS} items")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8: {error.reason}") from error
    if not items:
        raise ConfigError(f"{path} holds no items")
    return items


def _read_item(line: str, place: str) -> Item:
    kind: type[ChoiceItem | ExactItem] = ChoiceItem if '"choices"' in line else ExactItem
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        item: Item = adapter.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{place}: {field + ': ' if field else ''}{first['msg']}") from None
    return item
