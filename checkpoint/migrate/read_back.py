"""ReadBack: how much of what was just written is read again."""

from __future__ import annotations

from enum import StrEnum

END_BYTES = 1 << 20
"""What `ReadBack.ENDS` reads of each end of a window."""


class ReadBack(StrEnum):
    """What is read again of a window, and compared with what was meant."""

    FULL = "full"
    ENDS = "ends"
    NONE = "none"

    def slices(self, num_bytes: int) -> list[slice]:
        """Which parts of a window of so many bytes."""
        match self:
            case ReadBack.NONE:
                return []
            case ReadBack.ENDS if num_bytes > 2 * END_BYTES:
                return [slice(0, END_BYTES), slice(num_bytes - END_BYTES, num_bytes)]
        return [slice(0, num_bytes)]
