"""`jaxserve checkpoint`: output and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rig import TINY, Forker, convert, write_tensors
from safetensors.numpy import load_file

from checkpoint.param_loading import flatten
from checkpoint.store import Store, StoreReader
from models.checkpoint_model import CHECKPOINTS, write_model_folder
from models.loading import open_model
from models.registry import get_family

CONFIG = open_model(TINY / "biases").config


def write_run(folder: Path, *steps: int) -> dict:
    """A run with optimizer state, a random key and a counter; returns the last state."""
    write_model_folder(folder, CONFIG, None)
    family = get_family(CONFIG.family)
    with Store(folder / CHECKPOINTS) as store:
        for step in steps:
            params = family.init_params(CONFIG, jax.random.key(step), jnp.float32)
            state = {
                "params": params,
                "opt_state": optax.adam(1e-3).init(params),
                "rng": jax.random.key(step),
                "count": jnp.asarray(step, jnp.int32),
            }
            store.save(step, state, {"metrics": {"loss": 1.0}}).wait()
    return state


def test_convert_verify_inspect_and_list(tmp_path: Path, forker: Forker) -> None:
    target = tmp_path / "own"
    code, text = forker.run(
        *("convert", TINY / "mqa", target, "--to", "orbax", "--verify", "logits", "--json")
    )
    assert code == 0, text
    report = json.loads(text)
    assert report["num_arrays"] == 12
    assert "model.json" in report["files"]
    code, text = forker.run("verify", target, "--json")
    assert (code, json.loads(text)["verdict"]) == (0, "verified")
    code, text = forker.run("verify", TINY / "mqa")
    assert (code, "sound" in text) == (3, True)
    code, text = forker.run("inspect", target, "--json")
    inspected = json.loads(text)
    assert inspected["format"] == "orbax"
    assert inspected["made_from"]["path"] == str(TINY / "mqa")
    assert inspected["config"]["vocab_size"] == 257
    code, text = forker.run("list", target, "--json")
    (step,) = json.loads(text)
    assert (step["step"], step["name"]) == (0, f"{target}@0")


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path: Path, forker: Forker) -> None:
    target = tmp_path / "a.gguf"
    code, text = forker.run(
        *("convert", TINY / "mqa", target, "--to", "gguf", "--quantization", "q8_0"),
        *("--dry-run", "--json"),
    )
    assert code == 0, text
    plan = json.loads(text)
    by_name = {array["name"]: array for array in plan["arrays"]}
    assert by_name["blk.0.attn_q.weight"]["dtype"] == "Q8_0"
    assert (
        "unpermute_rope(4), transpose (to the file)" in by_name["blk.0.attn_q.weight"]["transforms"]
    )
    assert any("llama.cpp will not load" in note for note in plan["notes"])
    assert plan["peak_memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "onnx"), "--to 'onnx' is not one of safetensors, gguf, orbax"),
        (("--to", "gguf"), "is a file NAME.gguf"),
        (("--to", "orbax", "--quantization", "Q8_0"), "with --to orbax use --dtype"),
        (("--to", "orbax", "--dtype", "int8"), "--dtype 'int8' is not one of float32"),
        (("--to", "safetensors", "--layers", "unscanned"), "--layers unscanned is for --to orbax"),
        (("--to", "orbax", "--merge"), "--lora DIR and --merge go together"),
        (("--to", "orbax", "--memory-budget", "9XB"), "--memory-budget: '9XB' is no size"),
        (("--to", "orbax", "--memory-budget", "10MB"), "the program alone takes"),
        (("--to", "orbax", "--verify", "all"), "use --verify logits"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, forker: Forker
) -> None:
    code, text = forker.run("convert", TINY / "mqa", tmp_path / "own", *arguments)
    assert code == 2, text
    assert message in text.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_the_target_must_not_lie_in_the_source(tmp_path: Path, forker: Forker) -> None:
    folder = shutil.copytree(TINY / "mqa", tmp_path / "hf")
    for target in (folder, folder / "inside"):
        code, text = forker.run("convert", folder, target, "--to", "safetensors", "--force")
        assert code == 2, text
    code, text = forker.run("convert", tmp_path / "none", tmp_path / "own", "--to", "orbax")
    assert (code, "neither a path that exists" in text) == (2, True)


def test_diff_tells_where_and_how_much(tmp_path: Path, forker: Forker) -> None:
    tensors = load_file(TINY / "mqa" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    first = write_tensors(tmp_path / "first", tensors)
    changed = tensors[name].copy()
    changed[3, 5] = np.nextafter(changed[3, 5], np.float32(9))
    changed[7, 9] += 0.25
    second = write_tensors(tmp_path / "second", tensors | {name: changed})
    code, text = forker.run("diff", first, second, "--json")
    report = json.loads(text)
    (array,) = report["arrays"]
    assert code == 1
    assert array["name"] == "params/layers/mlp/up_proj/kernel"
    assert array["num_differing"] == 2
    assert array["max_abs"] == pytest.approx(0.25, rel=1e-6)
    # [layer, in, out]: the file's [out, in], and in our order the first of the two.
    assert array["first_index"] == [1, 5, 3]
    assert array["max_ulp"] > 1
    code, text = forker.run("diff", first, first)
    assert (code, "12 arrays are equal, 0 differ" in text) == (0, True)
    # Whatever formats they are in.
    convert(first, tmp_path / "own", "orbax")
    convert(first, tmp_path / "a.gguf", "gguf")
    assert forker.run("diff", tmp_path / "own", first)[0] == 0
    code, text = forker.run("diff", tmp_path / "a.gguf", first)
    assert (code, "12 arrays are equal" in text) == (1, True)  # The config: eps is rounded.


def test_one_ulp_is_one_ulp(tmp_path: Path, forker: Forker) -> None:
    tensors = {
        key: value.astype(np.float32)
        for key, value in load_file(TINY / "mqa" / "model.safetensors").items()
    }
    first = write_tensors(tmp_path / "first", tensors)
    norm = tensors["model.norm.weight"].copy()
    norm[0] = np.nextafter(norm[0], np.float32(9))
    second = write_tensors(tmp_path / "second", tensors | {"model.norm.weight": norm})
    (array,) = json.loads(forker.run("diff", first, second, "--json")[1])["arrays"]
    assert (array["max_ulp"], array["first_index"]) == (1, [0])


def test_reshard_keeps_everything_and_its_step(tmp_path: Path, forker: Forker) -> None:
    state = write_run(tmp_path / "run", 3, 7)
    code, text = forker.run(
        "reshard", tmp_path / "run", tmp_path / "single", "--layers", "unscanned"
    )
    assert code == 0, text
    names = StoreReader(tmp_path / "single" / CHECKPOINTS).open_step(7).arrays
    assert "opt_state/0/mu/layers/1/mlp/up_proj/kernel" in names
    code, text = forker.run("reshard", tmp_path / "single", tmp_path / "back")
    assert code == 0, text
    abstract = jax.tree.map(lambda leaf: leaf, state)
    restored = StoreReader(tmp_path / "back" / CHECKPOINTS).restore(7, abstract)
    assert (jax.random.key_data(restored["rng"]) == jax.random.key_data(state["rng"])).all()
    for one, other in zip(
        jax.tree.leaves(restored["opt_state"]), jax.tree.leaves(state["opt_state"]), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    code, text = forker.run("diff", f"{tmp_path / 'run'}@7", tmp_path / "back")
    assert code == 0, text
    assert StoreReader(tmp_path / "back" / CHECKPOINTS).metadata(7) == {"metrics": {"loss": 1.0}}
    code, text = forker.run("reshard", TINY / "mqa", tmp_path / "never")
    assert (code, "Use convert --to orbax first" in text.replace("\n", " ")) == (2, True)


def test_a_run_is_converted_at_any_of_its_steps(tmp_path: Path, forker: Forker) -> None:
    write_run(tmp_path / "run", 3, 7)
    code, text = forker.run(
        "convert", f"{tmp_path / 'run'}@3", tmp_path / "hf", "--to", "safetensors"
    )
    assert code == 0, text
    family = get_family(CONFIG.family)
    expected = flatten(family.init_params(CONFIG, jax.random.key(3), jnp.float32))
    for path, leaf in flatten(open_model(tmp_path / "hf").load_params(jnp.float32)).items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_orbax_itself_reads_what_was_streamed(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    convert(TINY / "mqa", tmp_path / "own", "orbax")
    folder = tmp_path / "own" / CHECKPOINTS / "steps" / f"{0:012d}" / "arrays"
    tree = ocp.PyTreeCheckpointHandler().restore(folder.absolute())
    expected = open_model(TINY / "mqa").load_params(jnp.bfloat16)
    np.testing.assert_array_equal(
        np.asarray(tree["params"]["layers"]["mlp"]["up_proj"]["kernel"]),
        np.asarray(expected["layers"]["mlp"]["up_proj"]["kernel"]),
    )
