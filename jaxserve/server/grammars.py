"""The grammars of constraints, waited for on the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.server.state import Serving

if TYPE_CHECKING:
    from jaxserve.engine.grammar.compiler import Grammar


async def grammar_of(constraint: Constraint | None, serving: Serving) -> Grammar | None:
    """The constraint's grammar, if there is a constraint. Compiled in a thread of its own, so
    that only those wait who need one.

    Raises InvalidRequest naming the part of `constraint` that is wrong, QueueFull or NotAccepting.
    """
    if constraint is None:
        return None
    assert serving.grammars is not None, "a model that generates has grammars"
    return await asyncio.wrap_future(serving.grammars.submit(constraint))
