"""What is wrong with training data, in words that say how to mend it."""

from __future__ import annotations

from jaxserve.errors import JaxserveError


class DataError(JaxserveError):
    """A source, an option or a prepared data set that cannot be used. The message
    names the file (and the line where there is one) and the way out."""
