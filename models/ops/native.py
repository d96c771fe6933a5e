"""The native CPU kernels: loading the library of the distribution `jaxserve-native`, and its calls.

The library registers its functions as targets of XLA's FFI, so they run inside compiled steps. It
chooses between instruction sets when it is loaded. Threads and choice are the process's own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import psutil
from jax.typing import DTypeLike

TARGETS = ("linear", "gate", "peaks", "write", "attention", "untouched")
"""Symbols `jaxserve_NAME` of the library, and names of the FFI's targets."""


class NativeError(ValueError):
    """The kernels cannot be used here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """A loaded library. One a process: XLA knows one function by a target's name."""

    path: Path
    handle: ctypes.CDLL

    def instruction_sets(self) -> tuple[str, ...]:
        """Those that this processor runs, the best first; the first is in use at first."""
        names: list[str] = []
        while (name := self.handle.jaxserve_kernels_name(len(names))) is not None:
            names.append(name.decode())
        return tuple(names)

    def choose(self, instruction_set: str) -> None:
        """Raises NativeError if this processor does not run it."""
        if not self.handle.jaxserve_choose_kernels(instruction_set.encode()):
            raise NativeError(
                f"this processor does not run {instruction_set!r}; choose from: "
                f"{', '.join(self.instruction_sets())}"
            )

    @property
    def num_threads(self) -> int:
        """Threads of one product, the calling one included."""
        return int(self.handle.jaxserve_get_num_threads())

    def set_num_threads(self, num_threads: int) -> None:
        """For the products to come."""
        self.handle.jaxserve_set_num_threads(num_threads)


_lock = threading.Lock()
_loaded: list[NativeLibrary] = []


def is_installed() -> bool:
    """Whether the distribution is there."""
    return importlib.util.find_spec("jaxserve_native") is not None


def load_library(path: Path | None = None) -> NativeLibrary:
    """The process's library, loaded and registered at the first call.

    Args:
        path: of another library than the installed one; must be the same at every call.

    Raises:
        NativeError: there is none, it cannot be loaded, or another one is loaded.
    """
    with _lock:
        if _loaded:
            if path is not None and path != _loaded[0].path:
                raise NativeError(f"{_loaded[0].path} is loaded, so {path} can't be")
            return _loaded[0]
        library = _open(_installed_path() if path is None else path)
        library.set_num_threads(num_physical_cores())
        _loaded.append(library)
        return library


@partial(jax.jit, static_argnums=(0, 1))
def untouched(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """An array of any values, on the CPU. Memory that has not been written to takes no room yet.

    `load_library` must have been called.
    """
    array: jax.Array = jax.ffi.ffi_call("jaxserve_untouched", jax.ShapeDtypeStruct(shape, dtype))()
    return array


def num_physical_cores() -> int:
    """Cores that this process may use; two threads of one core count once."""
    return max(1, min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0))))


def _installed_path() -> Path:
    if not is_installed():
        raise NativeError(
            "the native kernels are not installed: run `make native` in the repository, or choose "
            "--kernels xla"
        )
    import jaxserve_native

    path: Path = jaxserve_native.LIBRARY_PATH
    return path


def _open(path: Path) -> NativeLibrary:
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(
            f"the native kernels cannot be loaded ({error}): build them anew with `make native`, "
            "or choose --kernels xla"
        ) from error
    handle.jaxserve_kernels_name.restype = ctypes.c_char_p
    handle.jaxserve_kernels_name.argtypes = [ctypes.c_int64]
    handle.jaxserve_choose_kernels.argtypes = [ctypes.c_char_p]
    handle.jaxserve_get_num_threads.restype = ctypes.c_int64
    handle.jaxserve_set_num_threads.argtypes = [ctypes.c_int64]
    handle.jaxserve_set_num_threads.restype = None
    for target in TARGETS:
        symbol = getattr(handle, f"jaxserve_{target}", None)
        if symbol is None:
            raise NativeError(
                f"the native kernels at {path} are older than this program: build them anew with "
                "`make native`, or choose --kernels xla"
            )
        jax.ffi.register_ffi_target(f"jaxserve_{target}", jax.ffi.pycapsule(symbol), platform="cpu")
    return NativeLibrary(path, handle)
