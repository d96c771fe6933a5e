"""Traced steps, kept between starts: Python that runs for seconds to make the same program again.

A step is traced to StableHLO, which lies in a file beside the compiled programs, in a folder that
only its owner enters. Its name is a digest of all that the program follows from: shapes, settings
of jax, and the code of the packages that trace it. XLA's own cache then has the compiled program.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax import export

import jaxserve.engine
import models
from models.ops.native import TARGETS

if TYPE_CHECKING:
    from jaxserve.engine.compilation import ProgramSpec
    from jaxserve.engine.step_inputs import StepLayout

MAX_FILES = 64
"""Those used last; older ones are removed when another one is written."""
_CHECKSUM_BYTES = 32
_NO_PART_IN_A_PROGRAM = ("cache", "traceback")
"""Settings of jax with such a word in their name."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TraceFolder:
    """Where traces lie, and what tells those of this code from others."""

    path: Path
    code_digest: str

    @classmethod
    def of(cls, cache_dir: Path) -> TraceFolder:
        """In a folder for compiled programs, which `use_compilation_cache` has checked."""
        return cls(cache_dir / "traces", _code_digest())


def lower_step(
    folder: TraceFolder,
    spec: ProgramSpec,
    layout: StepLayout,
    step: Callable[..., Any],
    vector: jax.ShapeDtypeStruct,
) -> jax.stages.Lowered:
    """`step` for one device as `jax.jit(step, donate_argnums=(1, 2)).lower(...)` makes it.

    Args:
        folder: of the traces.
        spec, layout: what the step was made from.
        step: traced only if the folder hasn't got it.
        vector: its last argument.
    """
    given = (spec.step_params, spec.arrays.kv_pool, spec.arrays.slots)
    path = folder.path / f"{_digest(folder, spec, layout)}.stablehlo"
    exported = _read(path)
    if exported is None:
        exported = _trace(step, given, vector)
        _write(path, exported.serialize())
    results = jax.tree.structure((spec.arrays.kv_pool, spec.arrays.slots, 0))

    def call(params: Any, kv_pool: Any, slots: Any, inputs: jax.Array) -> Any:
        leaves = jax.tree.leaves((params, kv_pool, slots))
        return jax.tree.unflatten(results, exported.call(leaves, inputs))

    return jax.jit(call, donate_argnums=(1, 2)).lower(*given, vector)


def _trace(
    step: Callable[..., Any], given: tuple[Any, ...], vector: jax.ShapeDtypeStruct
) -> export.Exported:
    leaves, structure = jax.tree.flatten(given)

    def flat(leaves: list[jax.Array], inputs: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves), inputs))

    # Nobody promises that these calls stay as they are, but a trace of other code, or for another
    # jaxlib, has another name.
    calls = [*(f"jaxserve_{target}" for target in TARGETS), "LayoutConstraint"]
    kept = [export.DisabledSafetyCheck.custom_call(call) for call in calls]
    return export.export(jax.jit(flat), platforms=["cpu"], disabled_checks=kept)(leaves, vector)


def _digest(folder: TraceFolder, spec: ProgramSpec, layout: StepLayout) -> str:
    given = (spec.step_params, spec.arrays.kv_pool, spec.arrays.slots)
    described = (
        folder.code_digest,
        (jax.__version__, version("jaxlib")),
        sorted(_jax_settings()),
        (spec.config, str(spec.dtype), spec.attention.name, spec.max_model_len),
        layout,
        str(jax.tree.structure(given)),
        [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(given)],
    )
    return hashlib.blake2b(repr(described).encode(), digest_size=24).hexdigest()


def _jax_settings() -> Iterator[tuple[str, str]]:
    for name, value in jax.config.values.items():
        if not any(word in name for word in _NO_PART_IN_A_PROGRAM):
            yield name, repr(value)


def _code_digest() -> str:
    digest = hashlib.blake2b(digest_size=24)
    for package in (jaxserve.engine, models):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


def _read(path: Path) -> export.Exported | None:
    """None if there is none or it is damaged."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except FileNotFoundError:
        return None
    checksum, body = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest() != checksum:
        _log.warning("%s is damaged, and written anew", path)
        return None
    return export.deserialize(bytearray(body))


def _write(path: Path, body: bytes | bytearray) -> None:
    """The file is there whole or not at all; a disk without room is no reason to stop."""
    staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        checksum = hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
        staged.write_bytes(checksum + body)
        staged.replace(path)
        files = sorted(path.parent.glob("*.stablehlo"), key=lambda file: -file.stat().st_mtime)
        for old in files[MAX_FILES:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        staged.unlink(missing_ok=True)
        _log.warning("a traced step is not kept for the next start: %s", error)
