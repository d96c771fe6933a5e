"""The shared engine options give the EngineConfig that the user wrote."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from jaxserve.cli.engine_options import (
    ENGINE_OPTIONS,
    parse_buckets,
    parse_byte_size,
    parse_lora,
    with_engine_options,
)
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError
from models.mesh_shape import MeshShape


def parse(*args: str) -> tuple[EngineConfig, int]:
    app = typer.Typer(add_completion=False)
    seen: list[tuple[EngineConfig, int]] = []

    @app.command()
    @with_engine_options
    def serve(
        engine_config: EngineConfig, port: Annotated[int, typer.Option(help="A port.")] = 1
    ) -> None:
        """Serve."""
        seen.append((engine_config, port))

    result = CliRunner().invoke(app, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


def test_there_is_an_option_for_every_field() -> None:
    assert set(ENGINE_OPTIONS) == {field.name for field in fields(EngineConfig)}


def test_without_options_it_is_the_default_config() -> None:
    assert parse() == (EngineConfig(), 1)


def test_every_option_reaches_its_field() -> None:
    arguments = (
        "-m tiny.gguf --dtype float32 --quantization int8 --policy slack "
        "--token-budget 64 --buckets 8,64 --step-budget slack --slo-tbt-ms 50 --slo-ttft-ms 900.5 "
        "--max-num-seqs 8 --max-model-len 512 --kv-cache-bytes 1.5MiB --page-size 32 "
        "--kv-cache-dtype int8 "
        "--watermark 0.1 --max-queued-requests 5 --max-queued-tokens 99 --no-prefix-caching "
        "--mesh tensor=2,data=2 --virtual-devices 4 "
        "--weights-format native --kernels native "
        "--lora a=adapters/a --lora b-2=b --max-loras 3 --max-lora-rank 8 "
        "--speculative-method ngram --num-speculative-tokens 3 "
        "--prompt-lookup-max 5 --prompt-lookup-min 3 "
        "--attention reference --compilation-cache-dir cache --port 7"
    )
    expected = EngineConfig(
        model="tiny.gguf",
        dtype="float32",
        quantization="int8",
        policy="slack",
        step_budget="slack",
        token_budget=64,
        slo_tbt_ms=50.0,
        slo_ttft_ms=900.5,
        buckets=(8, 64),
        max_num_seqs=8,
        max_model_len=512,
        kv_cache_bytes=3 << 19,
        kv_cache_dtype="int8",
        page_size=32,
        watermark=0.1,
        max_queued_requests=5,
        max_queued_tokens=99,
        prefix_caching=False,
        weights_format="native",
        kernels="native",
        attention="reference",
        mesh=MeshShape(data=2, tensor=2),
        virtual_devices=4,
        lora=(("a", Path("adapters/a")), ("b-2", Path("b"))),
        max_loras=3,
        max_lora_rank=8,
        speculative_method="ngram",
        num_speculative_tokens=3,
        prompt_lookup_max=5,
        prompt_lookup_min=3,
        compilation_cache_dir=Path("cache"),
    )
    config, port = parse(*arguments.split())
    assert (config, port) == (expected, 7)
    defaults = EngineConfig()
    unchanged = {
        f.name for f in fields(config) if getattr(config, f.name) == getattr(defaults, f.name)
    }
    assert not unchanged


def test_a_bad_value_names_its_option() -> None:
    with pytest.raises(ConfigError, match="--dtype"):
        parse("--dtype", "float8")
    with pytest.raises(ConfigError, match="--quantization must be one of none, int8, int4"):
        parse("--quantization", "int3")
    with pytest.raises(ConfigError, match="--kernels must be one of auto, native, xla"):
        parse("--kernels", "cuda")
    with pytest.raises(ConfigError, match="--weights-format must be one of float, native"):
        parse("--weights-format", "gguf")
    for text in ("sql", "=a", "sql="):
        with pytest.raises(typer.BadParameter, match="NAME=FOLDER"):
            parse_lora(text)


@pytest.mark.parametrize(
    ("text", "expected_bytes"),
    [("512", 512), ("2GB", 2 * 10**9), ("512MiB", 1 << 29), ("1.5 kib", 1536), ("3tb", 3 * 10**12)],
)
def test_byte_sizes(text: str, expected_bytes: int) -> None:
    assert parse_byte_size(text) == expected_bytes


@pytest.mark.parametrize("text", ["", "2 apples", "-1", "1e9", "2G"])
def test_bad_byte_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="512MiB"):
        parse_byte_size(text)


def test_buckets() -> None:
    assert parse_buckets("one") == "one"
    assert parse_buckets("4,32,128") == (4, 32, 128)
    with pytest.raises(typer.BadParameter, match="4,32,128"):
        parse_buckets("4;32")


def test_a_command_without_the_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="engine_config"):
        with_engine_options(lambda: None)
