"""A view that prints lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class PlainView:
    """See `jaxserve.trainer.run_services.View`."""

    def say(self, text: str, *, warn: bool = False) -> None:
        print("warning:" if warn else "info:", text, file=sys.stderr, flush=True)

    def step(self, metrics: Mapping[str, Any]) -> None:
        pass
