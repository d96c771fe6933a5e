"""What can go wrong in training in a way that a person can mend."""

from __future__ import annotations

from jaxserve.errors import JaxserveError


class StateMismatch(JaxserveError):
    """Arrays or bytes that are not the state of this run. The message names them."""


class DeviceFault(JaxserveError):
    """A device computes wrongly, again and again. The message names it."""
