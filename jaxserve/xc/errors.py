"""What is wrong with a data set or a run of extreme classification, and how to mend it."""

from __future__ import annotations

from jaxserve.errors import JaxserveError


class XcDataError(JaxserveError):
    """A source or a prepared data set that cannot be used. The message names the file (and the
    line where there is one) and the way out."""


class EncoderCollapsed(JaxserveError):
    """All texts get the same embedding. The message says what to change."""
