"""Compiles the kernels: one shared library for all instruction sets, chosen between at run time.

    python models/ops/native_kernels/build_kernels.py --out FOLDER [--compiler "c++"] [--sanitize]

With `--sanitize` it is the kernels' own test that is compiled, with ASan and UBSan.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent / "src"
TEST_SOURCE = "kernels_test.cc"
XLA_SOURCE = "ffi.cc"
LIBRARY = "libjaxserve_native.so"

_FLAGS = ("-std=c++17", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=fast", "-pthread")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_FLAGS_OF = {
    "kernels_avx2.cc": _AVX2,
    "kernels_avx512.cc": _AVX512,
    "kernels_avx512vnni.cc": (*_AVX512, "-mavx512vnni"),
}
_AMX_SOURCE = "kernels_avx512amx.cc"
_AMX = (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
_X86 = ("x86_64", "AMD64")


class NoCompilerError(ValueError):
    """There is nothing to compile with; the message says what to install."""


def find_compiler() -> list[str]:
    """The command of a C++17 compiler: the system's, or that of the `ziglang` wheel.

    Raises NoCompilerError.
    """
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return [found]
    zig = Path(sysconfig.get_path("purelib")) / "ziglang"
    if zig.is_dir():
        return [sys.executable, "-m", "ziglang", "c++"]
    raise NoCompilerError("no C++ compiler: install g++, or the wheel: pip install ziglang")


def sources_digest(command: Sequence[str]) -> str:
    """Changes with whatever the library is made from."""
    digest = hashlib.sha256(platform.machine().encode())
    digest.update(subprocess.run([*command, "--version"], capture_output=True, check=True).stdout)
    for path in sorted([*SOURCES.iterdir(), Path(__file__)]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_library(folder: Path, compiler: Sequence[str] | None = None) -> Path:
    """`folder/LIBRARY`, compiled against the FFI's headers of the installed jax."""
    import jax

    names = sorted(path.name for path in SOURCES.glob("*.cc") if path.name != TEST_SOURCE)
    include = f"-I{jax.ffi.include_dir()}"
    return _build(folder / LIBRARY, names, compiler, ("-O3",), {XLA_SOURCE: (include,)}, "-shared")


def build_cached_library(cache: Path) -> Path:
    """The library in a folder of `cache` named by the digest of its sources."""
    command = find_compiler()
    folder = cache / sources_digest(command)
    if not (folder / LIBRARY).exists():
        build_library(folder, command)
    return folder / LIBRARY


def build_test(folder: Path, compiler: Sequence[str] | None = None) -> Path:
    """The kernels' own test as a program, with sanitizers. It needs no XLA."""
    names = sorted(path.name for path in SOURCES.glob("*.cc") if path.name != XLA_SOURCE)
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return _build(
        folder / "kernels_test", names, compiler, flags, {}, "-fsanitize=address,undefined"
    )


def _build(
    target: Path,
    names: Sequence[str],
    compiler: Sequence[str] | None,
    flags: Sequence[str],
    extra: dict[str, tuple[str, ...]],
    link_flag: str,
) -> Path:
    command = list(find_compiler() if compiler is None else compiler)
    target.parent.mkdir(parents=True, exist_ok=True)
    isa_flags = _isa_flags(command)
    with TemporaryDirectory(prefix="jaxserve-native-") as temporary:
        objects = [str(Path(temporary) / f"{name}.o") for name in names]

        def compile_one(name: str, out: str) -> None:
            own = (*isa_flags.get(name, ()), *extra.get(name, ()))
            _run([*command, *_FLAGS, *flags, *own, "-c", str(SOURCES / name), "-o", out])

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(compile_one, names, objects))
        # Another build of the same library may run beside this one.
        staged = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
        _run([*command, "-pthread", link_flag, *objects, "-o", str(staged)])
    staged.replace(target)
    return target


def _isa_flags(command: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By source. A compiler that is too old for tiles builds the library without them."""
    if platform.machine() not in _X86:
        return {}
    with TemporaryDirectory(prefix="jaxserve-native-") as temporary:
        source = Path(temporary) / "probe.cc"
        source.write_text("int probe;\n")
        probe = [*command, *_AMX, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        has_tiles = not subprocess.run(probe, capture_output=True, check=False).returncode
    return {**_FLAGS_OF, **({_AMX_SOURCE: _AMX} if has_tiles else {})}


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Compiles jaxserve's native kernels.")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is built")
    parser.add_argument("--compiler", type=shlex.split, help="command of a C++17 compiler")
    parser.add_argument("--sanitize", action="store_true", help="the kernels' own test instead")
    options = parser.parse_args()
    build = build_test if options.sanitize else build_library
    print(build(options.out, options.compiler))


if __name__ == "__main__":
    main()
