"""What this machine can do for jaxserve, and what is missing.

Each check gives findings: a value, whether it is fine, and the fix where not.
Checks look and measure; they change nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import jaxserve
from jaxserve import model_store
from jaxserve.engine.config import EngineConfig
from jaxserve.host_memory import read_host_memory
from jaxserve.server.config import ServerConfig

GIB = 1 << 30
MIN_FREE_MEMORY_BYTES = 2 * GIB
"""The default model in float32 with its KV cache and room to compile."""
MIN_FREE_DISK_BYTES = GIB
DISTRIBUTIONS = (
    "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "tokenizers", "jinja2", "gguf", "safetensors",
    "grpcio", "grpcio-health-checking", "grpcio-reflection", "protobuf", "prometheus-client",
    "psutil",
)  # fmt: skip
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


class Status(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Works, but something could be better."""
    BROKEN = "broken"
    """Something that is needed does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    value: str
    fix: str = ""
    """What to do about it. Empty when the status is OK."""


def examine(cache_root: Path | None = None) -> list[Finding]:
    """Runs every check. `cache_root` is `~/.cache/jaxserve` unless given.

    A check that fails in an unforeseen way is itself a finding.
    """
    root = cache_root if cache_root is not None else model_store.default_root()
    server = ServerConfig()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("own packages", lambda: check_own_packages(Path.cwd())),
        ("processor", check_processor),
        ("memory", check_memory),
        ("devices", check_devices),
        ("cache", lambda: check_cache(root)),
        ("model", lambda: check_default_model(root)),
        ("gRPC port", lambda: check_port("gRPC port", "--grpc-port", server.grpc_port)),
        ("HTTP port", lambda: check_port("HTTP port", "--http-port", server.http_port)),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:
            findings.append(
                Finding(
                    name,
                    Status.BROKEN,
                    f"{type(error).__name__}: {error}",
                    "this check should not fail; please report it with this line",
                )
            )
    return findings


def check_python() -> Iterator[Finding]:
    yield Finding("python", Status.OK, f"{platform.python_version()} at {sys.executable}")
    yield Finding("jaxserve", Status.OK, jaxserve.__version__)


def check_packages(distributions: tuple[str, ...] = DISTRIBUTIONS) -> Iterator[Finding]:
    versions: dict[str, str] = {}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            fix = f"install it: {sys.executable} -m pip install {name}"
            yield Finding(name, Status.BROKEN, "not installed", fix)
    yield Finding("packages", Status.OK, ", ".join(f"{n} {v}" for n, v in versions.items()))
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    if jax and jaxlib and jax.split(".")[:2] != jaxlib.split(".")[:2]:
        fix = f"install the pair: {sys.executable} -m pip install jax=={jax} jaxlib=={jax}"
        yield Finding("jaxlib", Status.BROKEN, f"{jaxlib} does not go with jax {jax}", fix)


def check_own_packages(directory: Path) -> Iterator[Finding]:
    """Whether Python, started in `directory`, would take other packages for ours.

    Importing jaxserve has already made sure of it for this process.
    """
    own_root = Path(jaxserve.__file__).resolve().parent.parent
    hidden = False
    for name in jaxserve.SIBLING_PACKAGES:
        for file in (directory / f"{name}.py", directory / name / "__init__.py"):
            if file.is_file() and directory.resolve() != own_root:
                hidden = True
                fix = "use the `jaxserve` command or `python -P` here, or another directory"
                value = f"{file} hides ours from `python -c` and `python -m` started here"
                yield Finding(f"package {name}", Status.NOTE, value, fix)
    if not hidden:
        names = ", ".join(jaxserve.SIBLING_PACKAGES)
        yield Finding("own packages", Status.OK, f"{names} in {own_root}")


def check_processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    flags: set[str] = set()
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
        elif key.strip() == "model name":
            model = value.strip()
    present = [name for name in CPU_FEATURES if name in flags]
    value = f"{model}, {cores} cores for this process, {' '.join(present) or 'no AVX2'}"
    if platform.machine() == "x86_64" and "avx2" not in flags:
        yield Finding(
            "processor", Status.NOTE, value, "a processor with AVX2 is several times faster"
        )
    else:
        yield Finding("processor", Status.OK, value)


def check_memory() -> Iterator[Finding]:
    memory = read_host_memory()
    total, available = memory.total_bytes, memory.available_bytes
    value = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if available < MIN_FREE_MEMORY_BYTES:
        fix = "stop other programs, or lower --kv-cache-bytes and --max-model-len"
        yield Finding("memory", Status.NOTE, value, fix)
    else:
        yield Finding("memory", Status.OK, value)


def check_devices() -> Iterator[Finding]:
    """Starts the JAX backend and runs one small compiled program on it."""
    import jax
    import jax.numpy as jnp

    try:
        devices = jax.devices()
        result = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8))))
    except RuntimeError as error:
        fix = "unset JAX_PLATFORMS, or install the extra of your driver: jaxserve[cuda12]"
        yield Finding("devices", Status.BROKEN, str(error).splitlines()[0], fix)
        return
    kinds = sorted({f"{d.platform} {d.device_kind}" for d in devices})
    value = f"{len(devices)} x {', '.join(kinds)}".replace("cpu cpu", "cpu")
    if result != 512.0:
        fix = "reinstall jaxlib, and try another machine: this one computes wrong results"
        yield Finding("devices", Status.BROKEN, f"{value}; a product gave {result}, not 512", fix)
    elif devices[0].platform == "cpu" and Path("/dev/nvidia0").exists():
        fix = "install GPU support: pip install 'jaxserve[cuda12]', or cuda13 by your driver"
        yield Finding("devices", Status.NOTE, f"{value}, though there is an NVIDIA GPU", fix)
    else:
        yield Finding("devices", Status.OK, value)


def check_cache(root: Path) -> Iterator[Finding]:
    folder = root
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        fix = f"make {folder} writable for you, or set XDG_CACHE_HOME to a directory that is"
        yield Finding("cache", Status.BROKEN, f"{root} cannot be written", fix)
        return
    free = shutil.disk_usage(folder).free
    value = f"{root}, {free / GIB:.1f} GiB free"
    if free < MIN_FREE_DISK_BYTES:
        fix = "make room, or set XDG_CACHE_HOME to a larger disk"
        yield Finding("cache", Status.NOTE, value, fix)
    else:
        yield Finding("cache", Status.OK, value)
    yield check_private_directory(root / "xla")


def check_private_directory(path: Path) -> Finding:
    """The compilation cache holds native code: whoever writes there runs as you."""
    name = "compilation cache"
    if not path.exists():
        return Finding(name, Status.OK, f"{path}, made at the first start")
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    value = f"{path}, mode {mode:04o}"
    if status.st_uid != os.getuid():
        fix = f"remove it, or take it over: chown {os.getuid()} {path}"
        return Finding(name, Status.BROKEN, f"{value}, owned by user {status.st_uid}", fix)
    if mode & 0o077:
        return Finding(name, Status.BROKEN, f"{value} is open to others", f"chmod 700 {path}")
    return Finding(name, Status.OK, value)


def check_default_model(root: Path) -> Iterator[Finding]:
    name = EngineConfig().model
    (listing,) = (item for item in model_store.list_models(root=root) if item.entry.name == name)
    if listing.path is not None:
        yield Finding("default model", Status.OK, f"{name} at {listing.path}")
    else:
        size = listing.entry.download_bytes / 1e6
        value = f"{name} is not downloaded yet ({size:.0f} MB, at first use)"
        yield Finding("default model", Status.NOTE, value, f"jaxserve pull {name}")


def check_port(name: str, flag: str, port: int) -> Iterator[Finding]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As servers do: a port whose last connection has just closed counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            fix = f"stop the program that has it, or serve with {flag} 0 (any free port)"
            yield Finding(name, Status.NOTE, f"127.0.0.1:{port}: {error.strerror}", fix)
        else:
            yield Finding(name, Status.OK, f"127.0.0.1:{port} is free")
