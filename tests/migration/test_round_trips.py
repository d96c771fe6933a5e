"""What is converted to ours and back is the same to the byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from rig import TINY, VARIANTS, convert, model_files, write_tensors
from safetensors.numpy import load_file, save_file

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten
from checkpoint.store import StoreReader
from jaxserve.errors import JaxserveError
from jaxserve.migration.convert import describe, plan_conversion
from jaxserve.migration.logits import LogitsApart, LogitsCheck, last_logits
from jaxserve.migration.request import ConversionRequest
from models.loading import open_model
from models.tokenizer import Tokenizer
from models.tokenizer_files import save_tokenizer
from tests.engine.tiny_tokenizers import byte_fallback_bpe, byte_level_bpe


def same_params(first: Path, second: Path, dtype: object = jnp.float32) -> None:
    ours = flatten(open_model(first).load_params(dtype))
    theirs = flatten(open_model(second).load_params(dtype))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(
            np.asarray(leaf).view(np.uint8), np.asarray(theirs[path]).view(np.uint8), err_msg=path
        )


FAST_ROUND_TRIPS = [("mqa", "scanned"), ("tied", "unscanned"), ("mixtral", "scanned")]


def some_fast(variants: list[str], fast: list[str]) -> list[object]:
    """All variants; those that are not `fast` run with the long tests."""
    return [
        pytest.param(variant, marks=() if variant in fast else pytest.mark.long)
        for variant in variants
    ]


@pytest.mark.parametrize(
    ("variant", "layers"),
    [
        pytest.param(
            *(variant, layers),
            marks=() if (variant, layers) in FAST_ROUND_TRIPS else pytest.mark.long,
        )
        for variant in VARIANTS
        for layers in ("scanned", "unscanned")
    ],
)
def test_a_folder_comes_back_byte_for_byte(variant: str, layers: str, tmp_path: Path) -> None:
    convert(TINY / variant, tmp_path / "own", "orbax", layers=layers)
    same_params(TINY / variant, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back", "safetensors")
    assert model_files(tmp_path / "back") == model_files(TINY / variant)


def with_config(variant: str, folder: Path, **changed: object) -> Path:
    """A golden folder with fields of its config changed."""
    shutil.copytree(TINY / variant, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changed}))
    return folder


@pytest.mark.parametrize(
    "variant",
    some_fast(
        [
            *("qwen2", "qwen3", "qwen3_biases", "gemma3", "gpt2", "phi3", "phi3_long_rope"),
            *("falcon_7b", "falcon_11b", "falcon_180b", "mixtral", "qwen3_moe"),
        ],
        ["gemma3", "phi3_long_rope", "gpt2", "falcon_7b", "qwen3_moe"],
    ),
)
def test_other_families_through_gguf_are_the_same_model(variant: str, tmp_path: Path) -> None:
    """Config and values; config.json is made anew, since GGUF does not keep it."""
    changed = {"query_pre_attn_scalar": 8} if variant == "gemma3" else {}
    source = with_config(variant, tmp_path / "hf", **changed)
    convert(source, tmp_path / "a.gguf", "gguf", quantization="F32")
    same_config(tmp_path / "a.gguf", source)
    same_params(source, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "own", "orbax")
    convert(tmp_path / "own", tmp_path / "back", "safetensors", dtype="float32")
    same_config(tmp_path / "back", source)
    same_params(source, tmp_path / "back")


def same_config(made: Path, source: Path) -> None:
    """But for the special tokens, which GGUF knows from the tokenizer; these have none. Numbers
    are float32 there."""
    theirs, ours = open_model(made).config, open_model(source).config
    assert theirs.rms_norm_eps == np.float32(ours.rms_norm_eps)
    if theirs.rope_scaling is not None and theirs.rope_scaling.kind == "longrope":
        assert ours.rope_scaling is not None
        for name in ("factors", "long_factors", "attention_factor"):
            single = np.array(getattr(ours.rope_scaling, name), np.float32)
            np.testing.assert_array_equal(getattr(theirs.rope_scaling, name), single)
        ours = replace(ours, rope_scaling=theirs.rope_scaling)
    assert theirs == replace(
        ours, rms_norm_eps=theirs.rms_norm_eps, bos_token_id=None, eos_token_ids=()
    )


@pytest.mark.parametrize(
    ("variant", "field"),
    [
        ("gemma3", "query_pre_attn_scalar"),
        ("qwen2_mixed_windows", "layer_windows"),
        ("qwen3_moe_unnormalized", "normalize_expert_weights"),
    ],
)
def test_what_gguf_cannot_say_is_refused_by_name(variant: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"GGUF cannot say this of a .* model: {field}"):
        convert(TINY / variant, tmp_path / "a.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variant", "note"),
    [
        ("falcon_180b", "knows no biases"),
        ("qwen3_biases", "knows no biases"),
        *(
            (variant, "ignores the sliding window")
            for variant in ("mistral_sliding_window", "phi3")
        ),
        *((variant, None) for variant in ("falcon_7b", "qwen2", "biases")),
    ],
)
def test_what_llama_cpp_does_not_know_is_noted(
    variant: str, note: str | None, tmp_path: Path
) -> None:
    request = ConversionRequest(tmp_path / "a.gguf", "gguf")
    with plan_conversion(TINY / variant, request, num_workers=1, memory_bytes=None) as conversion:
        notes = " ".join(conversion.migration.plan.notes)
    notes = notes.replace("the source has no tokenizer: llama.cpp will not load the file", "")
    assert note in notes if note else not notes


@pytest.mark.parametrize("variant", some_fast(["mqa", "tied", "llama3_rope_scaling"], ["mqa"]))
def test_logits_are_those_of_transformers_before_and_after(variant: str, tmp_path: Path) -> None:
    golden = np.load(TINY / variant / "logits.npz", allow_pickle=False)
    convert(TINY / variant, tmp_path / "own", "orbax")
    convert(tmp_path / "own", tmp_path / "back", "safetensors", dtype="float32")
    for folder in (TINY / variant, tmp_path / "own", tmp_path / "back"):
        (logits,) = last_logits(open_model(folder), [golden["token_ids"].tolist()])
        np.testing.assert_allclose(logits, golden["logits"][-1], rtol=0, atol=1e-5)


def test_buffers_written_out_heads_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = load_file(TINY / "tied" / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embed.copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.arange(4, dtype=np.float32)
    folder = write_tensors(tmp_path / "hf", tensors, tie_word_embeddings=True)
    shutil.copyfile(TINY / "tied" / "config.json", folder / "config.json")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "\u00e9"})
    convert(folder, tmp_path / "own", "orbax")
    convert(tmp_path / "own", tmp_path / "back", "safetensors")
    assert model_files(tmp_path / "back") == model_files(folder)


def test_nan_payloads_and_negative_zero_survive(tmp_path: Path) -> None:
    tensors = load_file(TINY / "mqa" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    odd = tensors[name].copy().view(np.uint16)
    odd[0, :4] = [0x8000, 0x7FC1, 0xFF81, 0x0001]
    tensors[name] = odd.view(ml_dtypes.bfloat16)
    folder = write_tensors(tmp_path / "hf", tensors)
    convert(folder, tmp_path / "own", "orbax")
    convert(tmp_path / "own", tmp_path / "back", "safetensors")
    assert model_files(tmp_path / "back") == model_files(folder)


@pytest.mark.parametrize(
    ("variant", "quantization", "dtype"),
    [
        ("tied", "F32", "float32"),
        ("mqa", "BF16", "bfloat16"),
        *(
            pytest.param(variant, *kind, marks=pytest.mark.long)
            for variant in ("biases", "head_dim", "tied", "llama2_mha", "mqa")
            for kind in (("F32", "float32"), ("BF16", "bfloat16"))
            if (variant, kind[0]) not in (("tied", "F32"), ("mqa", "BF16"))
        ),
    ],
)
def test_through_gguf_and_ours_every_tensor_is_the_same(
    variant: str, quantization: str, dtype: str, tmp_path: Path
) -> None:
    convert(TINY / variant, tmp_path / "a.gguf", "gguf", quantization=quantization)
    convert(tmp_path / "a.gguf", tmp_path / "own", "orbax")
    convert(tmp_path / "own", tmp_path / "back", "safetensors", dtype=dtype)
    same_params(TINY / variant, tmp_path / "back")


def test_float16_is_exact_where_it_can_be_and_refused_where_not(tmp_path: Path) -> None:
    tensors = {
        name: values.astype(np.float16)
        for name, values in load_file(TINY / "mqa" / "model.safetensors").items()
    }
    folder = write_tensors(tmp_path / "hf", tensors)
    convert(folder, tmp_path / "a.gguf", "gguf")
    assert open_model(tmp_path / "a.gguf").tensors.info("blk.0.attn_q.weight").dtype == "float16"
    convert(tmp_path / "a.gguf", tmp_path / "back", "safetensors", dtype="float16")
    same_params(folder, tmp_path / "back")
    big = {**tensors, "model.norm.weight": np.full(32, 1e6, np.float32)}
    folder = write_tensors(tmp_path / "big", big)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds values up to 1e\+06"):
        convert(folder, tmp_path / "half", "safetensors", dtype="float16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("kind", some_fast(["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"], ["Q8_0"]))
def test_quantised_files_hold_what_the_gguf_package_makes(kind: str, tmp_path: Path) -> None:
    convert(TINY / "mqa", tmp_path / "q.gguf", "gguf", quantization=kind)
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    original = load_file(TINY / "mqa" / "model.safetensors")
    embed = original["model.embed_tokens.weight"].astype(np.float32)
    quantization = gguf.GGMLQuantizationType[kind]
    wanted = gguf.quants.quantize(embed, quantization)
    np.testing.assert_array_equal(by_name["token_embd.weight"].data, wanted)
    assert by_name["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    # Rows of 56 are no multiple of a block's 32.
    assert by_name["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    convert(tmp_path / "q.gguf", tmp_path / "own", "orbax")
    step = StoreReader(tmp_path / "own" / "checkpoints").open_step()
    decoded = dequantize(np.asarray(by_name["token_embd.weight"].data), quantization)
    np.testing.assert_array_equal(step.read("params/embed"), decoded)


@pytest.mark.parametrize("kind", some_fast(["Q4_K", "Q5_K", "Q6_K"], ["Q6_K"]))
def test_k_quants_are_read_to_the_bit(kind: str, tmp_path: Path) -> None:
    config = open_model(TINY / "mqa").config
    random = np.random.default_rng(0)
    convert(TINY / "mqa", tmp_path / "plain.gguf", "gguf", quantization="F32")
    plain = gguf.GGUFReader(tmp_path / "plain.gguf")
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for key, value in {
        "vocab_size": config.vocab_size,
        "context_length": 64,
        "embedding_length": 256,
        "block_count": 1,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 4,
        "rope.dimension_count": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    stored = {}
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    for tensor in plain.tensors:
        if tensor.name.startswith("blk.1") or tensor.name == "output.weight":
            continue
        if "norm" in tensor.name:
            writer.add_tensor(tensor.name, np.ones(256, np.float32))
            continue
        rows = config.vocab_size if tensor.name == "token_embd.weight" else 256
        raw = random.integers(0, 256, (rows, 256 // block * size), dtype=np.uint8)
        # Scales of random bits may be NaN: those of the block's halves are made small numbers.
        halves = raw.view(np.uint16) if size % 2 == 0 else raw
        halves[:] &= 0x3BFF if size % 2 == 0 else 0xFF
        stored[tensor.name] = raw
        writer.add_tensor(tensor.name, raw, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "k.gguf", tmp_path / "own", "orbax")
    step = StoreReader(tmp_path / "own" / "checkpoints").open_step()
    expected = dequantize(stored["token_embd.weight"], quantization)
    found = step.read("params/embed")
    assert np.isfinite(expected).mean() > 0.9
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("make", "how_joined"), [(byte_level_bpe, "merges"), (byte_fallback_bpe, "scores")]
)
def test_a_tokenizer_goes_to_gguf_and_back(
    make: Callable[[], Tokenizer], how_joined: str, tmp_path: Path
) -> None:
    plain = make()
    tokenizer = Tokenizer(
        plain.backend,
        bos_token_id=plain.bos_token_id,
        eos_token_ids=plain.eos_token_ids,
        chat_template=TEMPLATE,
    )
    folder = shutil.copytree(TINY / "mqa", tmp_path / "hf")
    vocab = max(tokenizer.backend.get_vocab().values()) + 3
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (vocab, 32))
    save_file(tensors, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | {"vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps(fields))
    save_tokenizer(tokenizer, folder)
    convert(folder, tmp_path / "a.gguf", "gguf")
    read = open_model(tmp_path / "a.gguf").load_tokenizer()
    for text in ("the quick  brown fox 42", "hello <think now> \u65e5\u672c x", ""):
        assert read.encode(text) == tokenizer.encode(text)
    assert read.eos_token_ids == tokenizer.eos_token_ids
    assert read.chat_template == TEMPLATE
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert {
        *(f"tokenizer.ggml.{how_joined}", "tokenizer.ggml.eos_token_id"),
        *("general.architecture", "general.file_type", "llama.rope.freq_base"),
        *("llama.attention.layer_norm_rms_epsilon", "llama.rope.dimension_count"),
        *("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"),
    } <= fields.keys()
    convert(tmp_path / "a.gguf", tmp_path / "own", "orbax")
    convert(tmp_path / "own", tmp_path / "b.gguf", "gguf")
    again = open_model(tmp_path / "b.gguf").load_tokenizer()
    assert again.encode("the quick  brown fox 42") == tokenizer.encode("the quick  brown fox 42")
    assert again.chat_template == TEMPLATE


def test_a_template_goes_along(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY / "mqa", tmp_path / "hf")
    tokenizer = byte_level_bpe()
    with_template = Tokenizer(tokenizer.backend, eos_token_ids=(1,), chat_template=TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1], "temperature": 0.5}')
    save_tokenizer(with_template, folder)
    convert(folder, tmp_path / "own", "orbax")
    assert open_model(tmp_path / "own").load_tokenizer().chat_template == TEMPLATE
    convert(tmp_path / "own", tmp_path / "back", "safetensors")
    assert model_files(tmp_path / "back") == model_files(folder)


def test_the_plan_is_made_without_reading_weights(tmp_path: Path) -> None:
    request = ConversionRequest(tmp_path / "own", "orbax", dtype="float32")
    with plan_conversion(TINY / "biases", request, num_workers=1, memory_bytes=None) as conversion:
        plan = describe(conversion)
    by_name = {array["name"]: array for array in plan["arrays"]}
    kernel = by_name["params/layers/mlp/up_proj/kernel"]
    assert kernel["shape"] == [2, 32, 56]
    assert kernel["transforms"] == ["transpose (to ours)", "bfloat16 -> float32", "stack 2"]
    assert plan["num_bytes"] == sum(array["num_bytes"] for array in plan["arrays"])
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    tensors = load_file(TINY / "mqa" / "model.safetensors")
    tensors["stranger"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()
    folder = write_tensors(tmp_path / "hf", tensors)
    with pytest.raises(JaxserveError) as error:
        convert(folder, tmp_path / "own", "orbax")
    for line in ("missing: model.norm.weight", "unexpected: stranger", "wrong shape: lm_head"):
        assert line in str(error.value)


def test_an_untied_copy_is_refused(tmp_path: Path) -> None:
    tensors = load_file(TINY / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1
    folder = write_tensors(tmp_path / "hf", tensors)
    shutil.copyfile(TINY / "tied" / "config.json", folder / "config.json")
    with pytest.raises(JaxserveError, match="not tied: lm_head"):
        convert(folder, tmp_path / "own", "orbax")


def test_logits_are_compared_before_publishing(tmp_path: Path) -> None:
    strict = LogitsCheck(("a", "b"), max_kl=1e-9)
    convert(TINY / "mqa", tmp_path / "same", "orbax", check=strict)
    with pytest.raises(LogitsApart, match="Nothing was published"):
        convert(TINY / "mqa", tmp_path / "q.gguf", "gguf", quantization="Q4_0", check=strict)
    assert not (tmp_path / "q.gguf").exists()
