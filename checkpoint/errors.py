"""Errors of the checkpoint readers and writers."""

from __future__ import annotations


class FormatError(ValueError):
    """A file that does not keep to its format, or asks for something unsupported.

    The message names the file's rule that was broken and, where there is one,
    the way out. It is raised before anything is allocated from the file's word.
    """
