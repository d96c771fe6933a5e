"""Coverage-guided fuzzing of what reads bytes that others wrote.

    pip install atheris==3.0.0          # not in the lock: wheels for some Pythons only
    python tools/fuzz.py gguf --seconds 60
    python tools/fuzz.py all --seconds 60 --corpus build/fuzz

Inputs that found something new are kept in the corpus. An exception that the reader does not
promise, a crash, or an input that takes 10 s ends the run with an exit code other than 0, and the
input is written to the corpus' folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOW_S = 10
MAX_INPUT_BYTES = 8192
MEMORY_MB = 2048

Target = Callable[[bytes], None]


def gguf() -> Target:
    """The header of a model file; seeds are written by our own writer."""
    from checkpoint.errors import FormatError
    from checkpoint.formats.gguf_header import parse_header

    def one(data: bytes) -> None:
        with contextlib.suppress(FormatError):
            parse_header(memoryview(data))

    return one


def safetensors() -> Target:
    """A whole file, every tensor of which is read."""
    from checkpoint.errors import FormatError
    from checkpoint.formats.safetensors import SafetensorsFile

    path = Path("/dev/shm") / f"jaxserve-fuzz-{os.getpid()}.safetensors"  # noqa: S108  our own

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            file = SafetensorsFile(path)
            for name in file.names():
                file.read(name).sum()
        except FormatError:
            pass

    return one


def generate() -> Target:
    """A protobuf message and all that is checked of it before the engine sees it."""
    from google.protobuf.message import DecodeError

    from jaxserve.errors import InvalidRequest
    from jaxserve.proto.v1 import inference_pb2
    from jaxserve.server import convert
    from jaxserve.server.pacing import IMMEDIATE
    from jaxserve.server.prompt_limits import PromptLimits

    limits = PromptLimits.of_model(1000, 512)

    def one(data: bytes) -> None:
        try:
            request = inference_pb2.GenerateRequest.FromString(data)
            convert.check_request(request, limits)
            convert.pacing(request, IMMEDIATE)
            convert.sampling_params(request).validate(vocab_size=1000)
        except (DecodeError, InvalidRequest):
            pass

    return one


def http() -> Target:
    """A body of either kind of completion."""
    from pydantic import ValidationError

    from jaxserve.server.http.schema import ChatRequest, CompletionRequest

    def one(data: bytes) -> None:
        for body in (ChatRequest, CompletionRequest):
            try:
                body.model_validate_json(data)
            except ValidationError as error:
                error.errors(include_url=False, include_input=False, include_context=False)

    return one


def keys() -> Target:
    """A keys file."""
    from jaxserve.errors import ConfigError
    from jaxserve.server.access.key_file import read_key_file

    path = Path("/dev/shm") / f"jaxserve-fuzz-{os.getpid()}.toml"  # noqa: S108  our own

    def one(data: bytes) -> None:
        path.write_bytes(data)
        path.chmod(0o600)
        with contextlib.suppress(ConfigError):
            read_key_file(path)

    return one


TARGETS: dict[str, Callable[[], Target]] = {
    "gguf": gguf,
    "safetensors": safetensors,
    "generate": generate,
    "http": http,
    "keys": keys,
}


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with."""
    import numpy as np

    if target == "gguf":
        from gguf import GGMLQuantizationType, GGUFValueType

        from checkpoint.formats.gguf_writer import GgufTensor, GgufValue, make_header

        metadata = {
            "general.architecture": GgufValue(GGUFValueType.STRING, "llama"),
            "llama.block_count": GgufValue(GGUFValueType.UINT32, 2),
            "tokens": GgufValue(GGUFValueType.STRING, ["a", "b"], is_array=True),
        }
        tensors = [GgufTensor("a", (2, 32), GGMLQuantizationType.Q8_0, 68)]
        header, offsets = make_header(metadata, tensors)
        return [header + bytes(offsets[0] - len(header) + 68)]
    if target == "safetensors":
        from safetensors.numpy import save

        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        return [save({"a": values, "b": np.zeros(1, np.int8)})]
    if target == "generate":
        from jaxserve.server import convert

        message = convert.generate_request(
            "hello", temperature=0.5, stop=("x",), logit_bias={3: 1.0}, constraint={"regex": "a+"}
        )
        return [message.SerializeToString()]
    if target == "http":
        return [
            b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": true}',
            b'{"prompt": [1, 2], "n": 2, "logit_bias": {"3": 1}, "stop": ["a"], "logprobs": 2}',
        ]
    return [b'[[tenants]]\nname = "a"\nkey_sha256 = ["' + b"0" * 64 + b'"]\nweight = 2.0\n']


def fuzz(target: str, corpus: Path, seconds: int) -> None:
    """Does not return: libFuzzer ends the process."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris==3.0.0")
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["checkpoint", "jaxserve", "google.protobuf"]):
        one = TARGETS[target]()
        # Afterwards: what is imported for the seeds before would not be instrumented.
        for index, seed in enumerate(seeds(target)):
            (corpus / f"seed-{index}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={SLOW_S}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={corpus}/found-",
        "-print_final_stats=1",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"))
    arguments = parser.parse_args()
    if arguments.target != "all":
        fuzz(arguments.target, arguments.corpus / arguments.target, arguments.seconds)
    failed = []
    for target in TARGETS:
        options = ["--seconds", str(arguments.seconds), "--corpus", str(arguments.corpus)]
        done = subprocess.run([sys.executable, __file__, target, *options], check=False)
        if done.returncode:
            failed.append(target)
    if failed:
        sys.exit(f"something was found in: {', '.join(failed)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
