"""Steps on meshes of virtual devices: the tokens of one device, its bits where they are promised.

Promised are the bits of one device on every mesh with tensor=1, and those of tensor=T alone on
every mesh with tensor=T. Sums over T parts round differently than one sum.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "goldens" / "tiny"
LOGPROB_TOLERANCE = 1e-5
"""Of float32 sums in another order, as for the goldens."""

FAST = {
    "one": {},
    "data=2,stage=2": {"mesh": "data=2,stage=2"},
    "tensor=8": {"mesh": "tensor=8"},
}
LONG_MESHES = ("tensor=2", "tensor=4", "stage=4", "data=2,stage=2,tensor=2")
KINDS = (
    "gemma3",  # Layers that differ.
    "gpt2",  # Learned positions, fused projections with biases.
    "falcon_7b",  # One KV head, beside which the MLP runs.
    "phi3",  # A fused gate.
    "qwen3_moe",
)
QUICK_COMPILATION = "--xla_backend_optimization_level=0"
"""Where programs are compared with what others computed, not with each other's bits."""


def run(cases: dict[str, dict[str, Any]], cache_dir: Path, xla_flags: str = "") -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.step.mesh_runs", str(cache_dir), json.dumps(cases)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def assert_same_tokens(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["tokens"] == wanted["tokens"]
    for name, logprobs in wanted["logprobs"].items():
        np.testing.assert_allclose(
            found["logprobs"][name], logprobs, rtol=0, atol=LOGPROB_TOLERANCE
        )


def assert_same_bits(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["tokens"] == wanted["tokens"]
    assert found["logprobs"] == wanted["logprobs"]


def right_logprobs(model: str) -> np.ndarray:
    """Of the golden's tokens after the first."""
    golden = np.load(TINY / model / "logits.npz", allow_pickle=False)
    expected = np.asarray(jax.nn.log_softmax(golden["logits"], axis=-1))
    token_ids = golden["token_ids"]
    return expected[np.arange(len(token_ids) - 1), token_ids[1:]]


@pytest.fixture(scope="module")
def fast(compilation_cache: Path) -> dict[str, Any]:
    return run(FAST, compilation_cache)


def test_replicas_and_stages_give_the_bits_of_one_device(fast: dict[str, Any]) -> None:
    assert_same_bits(fast["data=2,stage=2"], fast["one"])


def test_parts_of_a_layer_give_the_tokens_of_one_device(fast: dict[str, Any]) -> None:
    # More devices than KV heads, which are copied.
    assert_same_tokens(fast["tensor=8"], fast["one"])
    assert fast["tensor=8"]["largest_part"] == 1 / 8


def test_nothing_compiles_when_a_mesh_serves(fast: dict[str, Any]) -> None:
    assert {name: result["compiles"] for name, result in fast.items()} == dict.fromkeys(FAST, 0)


@pytest.mark.long
def test_8_bits_on_a_mesh_are_those_of_one_device(compilation_cache: Path) -> None:
    weights = {"model": "phi3", "quantization": "int8", "scored": True}  # Fused: columns move.
    pages = {"kv_cache_dtype": "int8"}
    results = run(
        {
            "weights": weights,
            "weights, parts": {**weights, "mesh": "stage=2,tensor=2"},
            "pages": pages,
            "pages, parts": {**pages, "mesh": "data=2,stage=2"},
        },
        compilation_cache,
        QUICK_COMPILATION,
    )
    for name in ("weights", "pages"):
        assert results[f"{name}, parts"]["compiles"] == 0
    assert_same_bits(results["pages, parts"], results["pages"])
    found = results["weights, parts"]["prompt_logprobs"]
    np.testing.assert_allclose(
        found, results["weights"]["prompt_logprobs"], rtol=0, atol=LOGPROB_TOLERANCE
    )
    assert np.abs(np.subtract(found, right_logprobs("phi3"))).max() > 100 * LOGPROB_TOLERANCE


@pytest.mark.long
def test_every_mesh_gives_the_same_tokens(compilation_cache: Path) -> None:
    cases = {mesh: {"mesh": mesh} for mesh in ("tensor=1", *LONG_MESHES)}
    results = run(cases, compilation_cache)
    for mesh in LONG_MESHES:
        assert_same_tokens(results[mesh], results["tensor=1"])
        assert results[mesh]["compiles"] == 0
    assert_same_bits(results["stage=4"], results["tensor=1"])
    assert_same_bits(results["data=2,stage=2,tensor=2"], results["tensor=2"])


@pytest.mark.long
def test_every_kind_of_layer_can_be_divided(compilation_cache: Path) -> None:
    cases = {kind: {"model": kind, "mesh": "stage=2,tensor=2", "scored": True} for kind in KINDS}
    for kind, result in run(cases, compilation_cache, QUICK_COMPILATION).items():
        np.testing.assert_allclose(
            result["prompt_logprobs"],
            right_logprobs(kind),
            rtol=0,
            atol=LOGPROB_TOLERANCE,
            err_msg=kind,
        )
        assert result["compiles"] == 0, kind
        assert result["largest_part"] == 1 / 4, kind


@pytest.mark.long
def test_uniform_chunks_leave_stages_idle_for_a_third_of_orcas_rows(
    compilation_cache: Path,
) -> None:
    common = {
        "mesh": "stage=4",
        "buckets": (8, 72),
        "num_requests": 40,
        "max_num_seqs": 8,
        "num_pages": 200,
    }
    results = run(
        {
            "uniform": {**common, "policy": "sarathi", "token_budget": 8},
            "orca": {**common, "policy": "orca"},
        },
        compilation_cache,
        QUICK_COMPILATION,
    )
    uniform, orca = results["uniform"], results["orca"]
    assert uniform["tokens"].keys() == orca["tokens"].keys()
    assert uniform["idle_rows_per_micro_batch"] <= orca["idle_rows_per_micro_batch"] / 3
