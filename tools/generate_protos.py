"""Writes the Python code of `proto/` into `jaxserve/proto/`.

    python tools/generate_protos.py            # write
    python tools/generate_protos.py --check    # exit 1 when the files differ

The generated code asks for a protobuf runtime at least as new as the compiler
that wrote it, so `pyproject.toml` must pin that floor (printed at the end).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools  # type: ignore[import-untyped]
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("v1",)


def generate(out: Path) -> list[Path]:
    """Compiles every .proto file into `out` and returns the files written."""
    bundled = Path(grpc_tools.__file__).parent / "_proto"
    descriptors = out / "descriptors.bin"
    for version in VERSIONS:
        # Mapping the folder to a package of ours makes the generated imports
        # right; `jaxserve.v1` stays the name on the wire.
        sources = sorted((ROOT / "proto" / "jaxserve" / version).glob("*.proto"))
        arguments = [
            f"--proto_path=jaxserve/proto/{version}={ROOT / 'proto' / 'jaxserve' / version}",
            f"--proto_path={bundled}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            f"--descriptor_set_out={descriptors}",
            *(f"jaxserve/proto/{version}/{source.name}" for source in sources),
        ]
        if protoc.main(["protoc", *arguments]) != 0:
            sys.exit("protoc failed; its message is above")
        for file in FileDescriptorSet.FromString(descriptors.read_bytes()).file:
            stub = out / file.name.replace(".proto", "_pb2_grpc.pyi")
            stub.write_text(service_types(file))
        descriptors.unlink()
        for stub in out.rglob("*_pb2.pyi"):
            # protoc writes a bare `Mapping`.
            stub.write_text(f'# mypy: disable-error-code="type-arg"\n{stub.read_text()}')
    return sorted(path for path in out.rglob("*") if path.is_file())


def service_types(file: FileDescriptorProto) -> str:
    """Types of the stubs and servicers of one file, which protoc leaves out.

    The stub's are those of a synchronous channel.
    """
    module = file.name.removesuffix(".proto").replace("/", ".") + "_pb2"
    package, _, name = module.rpartition(".")
    lines = [
        f'"""Generated from {file.name} by tools/generate_protos.py: do not edit."""',
        "",
        "from typing import Any",
        "",
        "import grpc",
        "import grpc.aio",
        "",
        f"from {package} import {name} as pb",
    ]
    for service in file.service:
        lines += ["", f"class {service.name}Stub:"]
        lines.append(
            "    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None: ..."
        )
        for method in service.method:
            kind = "UnaryStream" if method.server_streaming else "UnaryUnary"
            arguments = f"{_type(method.input_type)}, {_type(method.output_type)}"
            lines.append(f"    {method.name}: grpc.{kind}MultiCallable[{arguments}]")
        lines += ["", f"class {service.name}Servicer:"]
        for method in service.method:
            # Any: a handler may be a function, a coroutine or a generator.
            request = _type(method.input_type)
            lines.append(
                f"    def {method.name}(self, request: {request}, context: Any) -> Any: ..."
            )
        lines += ["", f"def add_{service.name}Servicer_to_server("]
        lines.append(f"    servicer: {service.name}Servicer, server: grpc.Server | grpc.aio.Server")
        lines.append(") -> None: ...")
    return "\n".join([*lines, ""])


def _type(full_name: str) -> str:
    return f"pb.{full_name.rpartition('.')[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        stale = []
        for path in generate(Path(folder)):
            relative = path.relative_to(folder)
            target = ROOT / relative
            if not target.exists() or target.read_bytes() != path.read_bytes():
                stale.append(str(relative))
                if not check:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}\nrun: make protos")
    print(f"{len(stale)} files changed; the generated code needs {_runtime_floor()}")


def _runtime_floor() -> str:
    """The protobuf version that the generated code checks for at import."""
    text = (ROOT / "jaxserve" / "proto" / VERSIONS[0] / "inference_pb2.py").read_text()
    line = next(line for line in text.splitlines() if line.startswith("# Protobuf Python Version:"))
    return f"protobuf >= {line.split(':')[1].strip()}"


if __name__ == "__main__":
    main()
