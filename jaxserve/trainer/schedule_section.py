"""The `[schedule]` table: a plain schedule, or one that tunes itself."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, cast

from jaxserve.trainer.config_file import build
from jaxserve.trainer.errors import TrainConfigError
from schedules.config import Kind, ScheduleConfig, options_of
from schedules.tuner_config import TunerConfig, Variant

PLAIN = typing.get_args(Kind)
TUNED = typing.get_args(Variant)
_TUNER_FIELDS = tuple(one.name for one in dataclasses.fields(TunerConfig) if one.name != "variant")
TUNER_START_FRACTION = 1 / 64
"""With `--lr-schedule auto` on a config that has a peak: where the tuner starts from."""


def parse_schedule(
    table: Mapping[str, Any], total_steps: int, source: str
) -> ScheduleConfig | TunerConfig:
    """The schedule that a `[schedule]` table describes.

    Args:
        table: `kind`, and the fields of `ScheduleConfig` or `TunerConfig`.
        total_steps: of the run.
        source: where the table comes from, for messages.

    Raises:
        TrainConfigError: names the field and the fix.
    """
    fields = dict(table)
    kind = fields.get("kind", "knee")
    if kind in TUNED:
        del fields["kind"]
        given = fields.setdefault("total_steps", total_steps)
        if given != total_steps:
            raise TrainConfigError(
                f"{source}: schedule.total_steps is {given}, but total_steps is {total_steps}: "
                "leave it out"
            )
        tuned: TunerConfig = _build(TunerConfig, {**fields, "variant": kind}, source)
        return tuned
    if kind not in PLAIN:
        raise TrainConfigError(
            f"{source}: schedule.kind is {kind!r}; it must be one of {', '.join(PLAIN + TUNED)}"
        )
    if fields.get("unit", "steps") == "steps":
        fields.setdefault("total", total_steps)
    elif "total" not in fields and "tokens_per_step" in fields:
        fields["total"] = total_steps * fields["tokens_per_step"]
    plain: ScheduleConfig = _build(ScheduleConfig, fields, source)
    return plain


def with_kind(table: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The same peak and warm-up under another kind, as `--lr-schedule` asks for.

    Fields that the kind does not use are left out. A tuned one starts at 1/64 of the peak.

    Raises:
        TrainConfigError: there is no such kind, it needs more than there is, or a tuned schedule
            has no peak to take over.
    """
    if kind == table.get("kind", "knee"):
        return dict(table)
    if kind in TUNED:
        if table.get("kind") in TUNED:
            return {**table, "kind": kind}
        own = {name: table[name] for name in _TUNER_FIELDS if name in table}
        if "initial_lr" not in own:
            if "peak_value" not in table:
                raise TrainConfigError("--lr-schedule needs schedule.peak_value in the config")
            own["initial_lr"] = table["peak_value"] * TUNER_START_FRACTION
        return {"kind": kind, **own}
    if kind not in PLAIN:
        raise TrainConfigError(
            f"--lr-schedule {kind}: there is no such schedule; choose one of "
            f"{', '.join(PLAIN + TUNED)}"
        )
    needed, allowed = options_of(cast(Kind, kind))
    kept: tuple[str, ...] = ("peak_value", "warmup", "unit", "tokens_per_step", "total")
    kept += ("init_value", "count_from", "rewarm_at", "rewarm")
    if "peak_value" not in table:
        raise TrainConfigError(
            f"--lr-schedule {kind} needs a peak: give --set schedule.peak_value=..., too"
        )
    if missing := [name for name in needed if name != "total" and name not in table]:
        options = " ".join(f"--set schedule.{name}=..." for name in missing)
        raise TrainConfigError(f"--lr-schedule {kind} needs {', '.join(missing)}: give {options}")
    return {
        "kind": kind,
        **{name: table[name] for name in kept + needed + allowed if name in table},
    }


def _build(kind: type[Any], fields: Mapping[str, Any], source: str) -> Any:
    try:
        return build(kind, fields, f"{source}, [schedule]")
    except ValueError as error:
        raise TrainConfigError(f"{source}, [schedule]: {error}") from None


def resolved(schedule: ScheduleConfig | TunerConfig) -> dict[str, Any]:
    """All fields of a schedule that are set, as JSON values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(schedule).items()
        if value is not None
    }
