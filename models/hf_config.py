"""ModelConfig from a Hugging Face `config.json`.

Only what is computed here is accepted. A field that would change the model's output and is
not supported is refused by name: a model that loads is the model that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from checkpoint.errors import FormatError
from models.config import ModelConfig
from models.hf_families import ARCHITECTURES, Translate
from models.hf_fields import token_ids


def config_from_hf(
    fields: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Translate `config.json`.

    Args:
        fields: the parsed `config.json`.
        generation_config: the parsed `generation_config.json`, if there is one. Its
            `eos_token_id` counts before the one of `fields`: chat models end turns with it.

    Raises:
        FormatError: an unsupported architecture or field, or a value that is missing or
            makes no sense; the message names the field.
    """
    translate = _supported(fields)
    _refuse_unsupported(fields)
    eos = (generation_config or {}).get("eos_token_id")
    bos_token_ids = token_ids(fields.get("bos_token_id"))
    return replace(
        translate(fields),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=token_ids(fields.get("eos_token_id") if eos is None else eos),
    )


def _supported(fields: Mapping[str, Any]) -> Translate:
    architectures = fields.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise FormatError(
            f"config.json: architectures is {architectures!r}; it must name one of {known}"
        )
    if architectures == ["BertModel"]:
        raise FormatError(
            "config.json: BertModel is an encoder: it makes embeddings and generates no text; "
            f"supported are {known}"
        )
    if str(architectures[0]) not in ARCHITECTURES:
        raise FormatError(
            f"config.json: architectures names {architectures[0]!r}, which is not supported; "
            f"supported are {known}"
        )
    model_type, translate = ARCHITECTURES[architectures[0]]
    if fields.get("model_type", model_type) != model_type:
        raise FormatError(
            f"config.json: model_type {fields['model_type']!r} does not go with "
            f"architectures {architectures[0]!r}; it must be {model_type!r}"
        )
    return translate


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if fields.get("auto_map"):
        raise FormatError(
            "config.json: auto_map asks to run Python code from the model's folder, which is "
            "never done; use a version of the model without it, or remove auto_map if the model "
            "is a plain one of the architecture that it names"
        )
    if fields.get("quantization_config"):
        raise FormatError(
            "config.json: quantization_config is not supported; use the unquantised folder of "
            "the model, or a GGUF file"
        )
