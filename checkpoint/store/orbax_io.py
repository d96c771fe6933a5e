"""Array files. The one module that knows Orbax and the layout of what it writes.

Orbax writes logical arrays (OCDBT key-value files holding Zarr 2 arrays, uncompressed). Steps
that were not written by Orbax, see `array_files`, have a folder an array instead of OCDBT.
Reading goes straight to TensorStore: Orbax's own restore does not notice changed values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from checkpoint.store.chunk_files import ChunkFiles
from checkpoint.store.durable import Deadline
from checkpoint.store.errors import SaveFailed, StoreUnreadable
from checkpoint.store.tree import DTYPES, HostArray

_REFUSALS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""How TensorStore's errors begin that speak of this process or system, not of the files."""


OCDBT_MANIFEST = "manifest.ocdbt"


class ArrayWrite:
    """A write that goes on in the background, from `start` until `wait` returns."""

    def __init__(self, checkpointer: Any) -> None:
        self._checkpointer = checkpointer

    @classmethod
    def start(
        cls,
        folder: Path,
        arrays: Mapping[str, HostArray],
        stacked: Collection[str],
        deadline: Deadline,
    ) -> ArrayWrite:
        """Begin to write `arrays` to the new `folder`.

        Args:
            folder: absolute path.
            arrays: by name, at least one, none of them empty; must not change until `wait`.
            stacked: names whose first axis is the layer: stored in one chunk per layer.
            deadline: of the whole save.
        """
        # Takes seconds to import, which readers need not spend.
        import orbax.checkpoint as ocp  # type: ignore[import-untyped]

        process = jax.process_index()
        if process != 0:
            raise SaveFailed(
                f"process {process} of a jax.distributed job cannot save: process 0 can"
            )
        # The one writer waits for no other process.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="store"
        )
        numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=False,
            use_compression=False,
            multiprocessing_options=alone,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (np.ndarray, numpy_handler), (jax.Array, ocp.type_handlers.ArrayHandler())
            ),
        )
        checkpointer = ocp.AsyncCheckpointer(
            handler,
            async_options=ocp.AsyncOptions(timeout_secs=max(1, int(deadline.remaining_s))),
            multiprocessing_options=alone,
        )
        save_args = {
            name: ocp.SaveArgs(shard_axes=(0,) if name in stacked else ()) for name in arrays
        }
        checkpointer.save(
            folder, args=ocp.args.PyTreeSave(_nest(arrays), save_args=_nest(save_args))
        )
        return cls(checkpointer)

    def wait(self) -> None:
        """Returns when all is written; raises what went wrong in this very write."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Ends Orbax's threads. Call it after `wait`, also when that raised."""
        self._checkpointer.close()


class ArrayReader:
    """Arrays of one folder, read anew from the files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A context of its own: nothing that an earlier reader cached is seen.
        self._context = ts.Context()

    def read(self, name: str) -> HostArray:
        """All values of one array.

        Raises:
            ValueError, OSError: it is not there, or the files cannot be understood.
            StoreUnreadable: the system refuses to read.
        """
        return self.read_part(name, (slice(None),))

    def read_part(self, name: str, part: tuple[slice, ...]) -> HostArray:
        """The values of a part of one array: one slice an axis, missing ones mean all.

        Raises: as `read`.
        """
        try:
            opened = self._open(name)
            array: HostArray = np.asarray(opened[part[: opened.rank]].read().result())
        except ValueError as error:
            if str(error).startswith(_REFUSALS):
                raise StoreUnreadable(f"{self._folder}: array {name}: {error}") from error
            raise
        if array.dtype.name not in DTYPES:
            raise ValueError(f"dtype {array.dtype}")
        return array

    def read_into(self, name: str, part: tuple[slice, ...], out: HostArray) -> None:
        """As `read_part`, with a slice for each axis, into memory of that shape and dtype."""
        chunks = ChunkFiles.open(self._folder / name.replace("/", "."))
        if chunks is None:
            out[...] = self.read_part(name, part)
        else:
            chunks.read_into(part, out)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Of one array; NumPy's name of the dtype. Raises: as `read`."""
        opened = self._open(name)
        return tuple(opened.shape), opened.dtype.numpy_dtype.name

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """How an array is divided into pieces that can be read alone."""
        return tuple(size or 0 for size in self._open(name).chunk_layout.read_chunk.shape or ())

    def _open(self, name: str) -> ts.TensorStore:
        path = f"{name.replace('/', '.')}/"
        if (self._folder / OCDBT_MANIFEST).exists():
            base = {"driver": "file", "path": f"{self._folder}/"}
            kvstore: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": path}
        else:
            kvstore = {"driver": "file", "path": f"{self._folder}/{path}"}
        spec = {"driver": "zarr", "kvstore": kvstore}
        return ts.open(spec, context=self._context, open=True, read=True).result()


def make_array_folder(
    folder: Path, name: str, dtype: str, shape: tuple[int, ...], chunk_shape: tuple[int, ...]
) -> None:
    """An array below `folder` that is still without chunks; it may be there already.

    Raises:
        OSError: the system refuses, or there is an array of another shape.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/{name.replace('/', '.')}/"},
        "metadata": {
            "shape": list(shape),
            "chunks": list(chunk_shape),
            "compressor": None,
            "order": "C",
        },
        "dtype": dtype,
    }
    context = ts.Context({"file_io_sync": False})
    try:
        ts.open(spec, context=context, open=True, create=True).result()
    except ValueError as error:  # TensorStore's, for a full disk as for all else.
        raise OSError(str(error).splitlines()[0]) from error


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested
