"""ModelConfig: the shape and constants of a decoder, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary-embedding scaling. `kind` is "linear", "llama3" or "factors"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    """Of kind "factors": D / 2 divisors of the frequencies, as GGUF files store
    what llama3 scaling comes to."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Letters in brackets are the glossary's: E, F, L, H, K, D, V."""

    family: str
    """Key of `models.registry`, e.g. "llama"."""
    vocab_size: int
    """V"""
    hidden_size: int
    """E"""
    intermediate_size: int
    """F"""
    num_layers: int
    """L"""
    num_heads: int
    """H, query heads"""
    num_kv_heads: int
    """K"""
    head_dim: int
    """D"""
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    """A row at position p sees keys p - sliding_window + 1 .. p."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
