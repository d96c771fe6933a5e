"""IndexSampler: which example is the i-th of a run, computed from i alone.

The order of an epoch is a permutation of the example ids made by a Feistel network
over the smallest power of four that holds them, walked along its cycles until it
lands inside (Black and Rogaway 2002, the method of format-preserving encryption).
Nothing is shuffled or stored, so the whole state of the data order is one integer.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.mixing import GOLDEN_64, mix64, mix64_int

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

NUM_ROUNDS = 8
MAX_SUBSTITUTE_TRIES = 256
_SUBSTITUTE_STREAM = 0x5EED0F5B57117E00


class IndexSampler:
    """The order of examples of a run: stateless, random access, vectorised.

    Index `i` counts the examples of the run from 0. Its epoch is `i // num_examples`,
    and its id is the `i % num_examples`-th of that epoch's permutation.

    Quarantined ids are replaced in place, so no other example moves: position `i` gets
    the first id that is not quarantined of its own stream of pseudo-random ids, a
    function of (seed, i). Quarantining more ids later changes only positions whose id
    is among them. A substitute is an ordinary example, seen twice in that epoch.

    Args:
        num_examples: ids are 0 .. num_examples - 1.
        seed: of the order; any integer from 0 to 2**63 - 1.
        quarantined: ids never to be returned; at most half of all.

    Raises ValueError for arguments outside these bounds.
    """

    def __init__(
        self, num_examples: int, seed: int, quarantined: Iterable[int] = frozenset()
    ) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, not {num_examples}")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")
        self.num_examples = num_examples
        self.seed = seed
        self.quarantined = frozenset(quarantined)
        self._quarantined_ids = np.array(sorted(self.quarantined), dtype=np.int64)
        if self.quarantined:
            if not 0 <= min(self.quarantined) <= max(self.quarantined) < num_examples:
                raise ValueError(f"quarantined ids must be from 0 to {num_examples - 1}")
            if 2 * len(self.quarantined) > num_examples:
                raise ValueError(
                    f"{len(self.quarantined)} of {num_examples} examples are quarantined, more "
                    "than half: mend the data or the rule that quarantines"
                )
        self._half_bits = max(1, ((num_examples - 1).bit_length() + 1) // 2)

    def ids_of(self, first_index: int, count: int) -> Int64Array:
        """Ids of the examples `first_index` .. `first_index + count - 1`: int64 [count].

        The range may cross epochs. Raises ValueError for a negative argument.
        """
        if first_index < 0 or count < 0:
            raise ValueError(f"first_index and count must not be negative: {first_index}, {count}")
        parts = [np.empty(0, np.int64)]
        index, end = first_index, first_index + count
        while index < end:
            epoch, offset = divmod(index, self.num_examples)
            stop = min(end - index, self.num_examples - offset) + offset
            parts.append(self._permute(np.arange(offset, stop, dtype=np.uint64), epoch))
            index += stop - offset
        ids = np.concatenate(parts)
        self._replace_quarantined(ids, first_index)
        return ids

    def _permute(self, values: UInt64Array, epoch: int) -> Int64Array:
        """The epoch's permutation of [0, num_examples) at `values`."""
        keys = _round_keys(self.seed, epoch)
        ids = self._feistel(values, keys)
        while len(outside := np.flatnonzero(ids >= self.num_examples)):
            ids[outside] = self._feistel(ids[outside], keys)
        return ids.astype(np.int64)

    def _feistel(self, values: UInt64Array, keys: list[np.uint64]) -> UInt64Array:
        """A permutation of [0, 4 ** half_bits), which holds num_examples."""
        half = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        return (left << half) | right

    def _replace_quarantined(self, ids: Int64Array, first_index: int) -> None:
        if not self.quarantined:
            return
        stream = mix64_int(self.seed ^ _SUBSTITUTE_STREAM)
        for row in np.flatnonzero(np.isin(ids, self._quarantined_ids)):
            start = mix64_int(stream ^ (first_index + int(row)))
            ids[row] = self._substitute(start)

    def _substitute(self, start: int) -> int:
        for attempt in range(MAX_SUBSTITUTE_TRIES):
            candidate = mix64_int(start + attempt * GOLDEN_64) % self.num_examples
            if candidate not in self.quarantined:
                return candidate
        # Each try fails with a chance of at most one half.
        raise AssertionError("no substitute found in 256 tries")


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    """One key a round, from a splitmix64 stream that (seed, epoch) starts."""
    state = mix64_int(mix64_int(seed + GOLDEN_64) ^ epoch)
    return [np.uint64(mix64_int(state + number * GOLDEN_64)) for number in range(1, NUM_ROUNDS + 1)]
