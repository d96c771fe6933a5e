"""What a log may say of an exception: where it came from, not its text."""

from __future__ import annotations

import logging
import traceback


def log_failure(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Logs `what`, the exception's type and its frames, and the same of its causes.

    An exception's own text may hold a piece of a prompt, so it is left out.
    """
    lines = []
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        lines.append(f"{type(one).__module__}.{type(one).__qualname__}\n")
        lines.extend(traceback.format_tb(one.__traceback__))
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        if one is not None:
            lines.append("while handling, or caused by: ")
    logger.error("%s: %s", what, "".join(lines).rstrip())
