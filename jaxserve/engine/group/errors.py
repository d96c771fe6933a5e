"""What can go wrong in a group of processes."""

from __future__ import annotations

from jaxserve.errors import JaxserveError


class GroupError(JaxserveError):
    """A group of processes that could not be formed, or has come apart."""
