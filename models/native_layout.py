"""The layout of a decoder's weights for the native CPU kernels.

Every projection's kernel leaves `layers` and stands, packed, under `packed_kernels`, nested like
`layers`; the LM head stands under `packed_head`. q, k and v become one projection, gate and up
another, as in `models.gpu_layout`, if all of them are held in the same kind of numbers. What
remains, embeddings, norms and biases, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten, unflatten
from models.config import ModelConfig
from models.layers import FUSED_PROJECTIONS
from models.ops.packed import Codes, Kind, PackedKernel, abstract_packed, pack

Params = dict[str, Any]
"""See `models.decoder.Params`."""

PACKED_KERNELS, PACKED_HEAD = "packed_kernels", "packed_head"
HEAD = "head"
"""What `KindOf` calls the LM head, tied or not."""
KindOf = Callable[[str], Kind]
"""A kernel's path, such as `layers.attention.q_proj.kernel`, or `HEAD`, to its kind."""

_KERNEL, _BIAS = ".kernel", ".bias"


def check_packable(config: ModelConfig) -> None:
    """Raises FormatError for a model that the native kernels do not run."""
    if config.num_experts:
        raise FormatError(
            f"the native kernels do not run mixtures of experts ({config.family}): choose "
            "--kernels xla"
        )


def native_shapes(abstract: Params, config: ModelConfig, kind_of: KindOf) -> Params:
    """The pytree of `lay_out_natively` as `jax.ShapeDtypeStruct`.

    Args:
        abstract: the family's parameters, not quantised.
        config: of the model.
        kind_of: see `KindOf`.
    """

    def packed(path: str, parts: Sequence[Any]) -> PackedKernel:
        num_layers, num_in, _ = parts[0].shape
        num_out = sum(part.shape[-1] for part in parts)
        return abstract_packed(kind_of(path), num_layers, num_in, num_out)

    def beside(parts: Sequence[Any]) -> Any:
        shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
        return jax.ShapeDtypeStruct(shape, parts[0].dtype)

    laid_out = _lay_out(abstract, kind_of, packed, beside)
    laid_out[PACKED_HEAD] = abstract_packed(kind_of(HEAD), 1, config.hidden_size, config.vocab_size)
    return laid_out


def lay_out_natively(params: Params, head: Any, kind_of: KindOf) -> Params:
    """Parameters with packed kernels; they stay on the host.

    Args:
        params: the family's, host arrays; a kernel under `layers` may be `Codes`. Its `layers`
            are emptied.
        head: the LM head `[1, E, V]`, an array or `Codes`.
        kind_of: what the kernels are; see `KindOf`.
    """

    def packed(path: str, parts: Sequence[Any]) -> PackedKernel:
        del path
        return pack(_side_by_side(parts))

    def beside(parts: Sequence[Any]) -> Any:
        return np.concatenate([np.asarray(part) for part in parts], axis=-1)

    laid_out = _lay_out(params, kind_of, packed, beside)
    laid_out[PACKED_HEAD] = pack(head)
    return laid_out


def _lay_out(
    params: Params,
    kind_of: KindOf,
    pack_parts: Callable[[str, Sequence[Any]], PackedKernel],
    join: Callable[[Sequence[Any]], Any],
) -> Params:
    laid_out = {name: part for name, part in params.items() if name not in ("layers", "lm_head")}
    leaves = flatten(params["layers"])
    fuses = _fuses(leaves, kind_of)
    packed: dict[str, PackedKernel] = {}
    others: dict[str, Any] = {}
    for path in list(leaves):
        if path not in leaves:  # joined to another one
            continue
        target, sources = _joined(path, leaves) if fuses else (path, (path,))
        parts = [leaves.pop(source) for source in sources]
        if path.endswith(_KERNEL):
            packed[target.removesuffix(_KERNEL)] = pack_parts(f"layers.{path}", parts)
        else:
            others[target] = parts[0] if len(parts) == 1 else join(parts)
    laid_out["layers"] = unflatten(others)
    laid_out[PACKED_KERNELS] = unflatten(packed)
    return laid_out


def _fuses(leaves: Mapping[str, Any], kind_of: KindOf) -> bool:
    """Whether the model has projections to join, all of one kind where they are joined."""
    groups = [
        [f"layers.{source}" for source in _joined(path, leaves)[1]]
        for path in leaves
        if path.endswith(_KERNEL)
    ]
    joined = [group for group in groups if len(group) > 1]
    return bool(joined) and all(len({kind_of(path) for path in group}) == 1 for group in joined)


def _joined(path: str, leaves: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The fused leaf that `path` goes into, and all that do, in order; itself if it is alone."""
    for ending in (_KERNEL, _BIAS):
        module, _, name = path.removesuffix(ending).rpartition(".")
        if not path.endswith(ending):
            continue
        for fused, names in FUSED_PROJECTIONS.items():
            sources = tuple(f"{module}.{part}{ending}" for part in names)
            if name in names and all(source in leaves for source in sources):
                return f"{module}.{fused}{ending}", sources
    return path, (path,)


def _side_by_side(parts: Sequence[Any]) -> Any:
    """Kernels of the same inputs as one."""
    if len(parts) == 1:
        return parts[0]
    if not isinstance(parts[0], Codes):
        return np.concatenate(parts, axis=-1)
    has_minima = parts[0].minima is not None
    return Codes(
        np.concatenate([part.codes for part in parts], axis=-1),
        np.concatenate([part.scales for part in parts], axis=-1),
        np.concatenate([part.minima for part in parts], axis=-1) if has_minima else None,
    )
