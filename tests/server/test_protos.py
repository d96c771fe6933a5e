"""The committed stubs are those of `proto/`, and their runtime is required."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from jaxserve.proto.v1 import inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_current():
    command = [sys.executable, str(ROOT / "tools" / "generate_protos.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_required_runtimes_are_those_of_the_generated_code():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    source = Path(inference_pb2.__file__).read_text()
    protobuf = re.search(r"# Protobuf Python Version: (\S+)", source)[1]
    assert f"protobuf>={protobuf}" in project["dependencies"]
    grpcio = inference_pb2_grpc.GRPC_GENERATED_VERSION
    assert f"grpcio>={grpcio}" in project["dependencies"]


def test_every_request_field_tells_absent_from_zero():
    """Scalars of a request have presence, except those that are required."""
    required = {"TextPrompt.text", "ChatMessage.role", "ChatMessage.content"}
    for name in ("GenerateRequest", "EmbedRequest", *REQUEST_PARTS):
        for field in inference_pb2.DESCRIPTOR.message_types_by_name[name].fields:
            path = f"{name}.{field.name}"
            assert field.has_presence or field.is_repeated or path in required, path


REQUEST_PARTS = (
    "TextPrompt",
    "TokenIds",
    "ChatPrompt",
    "ChatMessage",
    "Sampling",
    "Decoding",
    "LogitBias",
    "Stopping",
    "ResponseOptions",
    "Cache",
)
