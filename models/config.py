"""ModelConfig: the shape and constants of a model, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary-embedding scaling. `kind` is "linear", "llama3", "factors" or "longrope"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    """Of kind "factors": R / 2 divisors of the frequencies (R rotated dimensions), as GGUF
    files store what llama3 scaling comes to. Of kind "longrope": the divisors of models that
    serve no more than `original_max_position_embeddings`."""
    long_factors: tuple[float, ...] = ()
    """Of kind "longrope": the divisors of models that serve more."""
    attention_factor: float = 1.0
    """Of kind "longrope": what cosines and sines are multiplied by."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Letters in brackets are the glossary's: E, F, L, H, K, D, V.

    What a family does not have keeps its default.

    Raises:
        ValueError: `layer_windows` that say nothing, or contradict another field.
    """

    family: str
    """Key of `models.registry`, e.g. "llama"."""
    vocab_size: int
    """V"""
    hidden_size: int
    """E"""
    intermediate_size: int
    """F; in a mixture of experts, of one expert."""
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
    """Epsilon of the norms, LayerNorm's included."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    """A row at position p sees keys p - sliding_window + 1 .. p, in every layer."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    hidden_act: str = "silu"
    """Key of `models.ops.activation.ACTIVATIONS`."""
    rotary_dim: int | None = None
    """R, how many of a head's first dimensions are rotated: None for all, 0 for none."""
    layer_windows: tuple[int | None, ...] = ()
    """Each layer's window, where layers differ; `sliding_window` is then None."""
    rope_local_theta: float | None = None
    """Rotary base of the layers that have a window, if it is not `rope_theta`."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its square root, if not by that of D."""
    num_experts: int = 0
    num_experts_per_token: int = 0
    normalize_expert_weights: bool = True
    """Whether the chosen experts' weights are scaled to sum to one."""
    num_layer_norms: int = 1
    """Norms before a parallel block: one for both halves, or one each."""

    def __post_init__(self) -> None:
        if not self.layer_windows:
            return
        if len(self.layer_windows) != self.num_layers or len(set(self.layer_windows)) == 1:
            raise ValueError(
                f"layer_windows must name {self.num_layers} windows that are not all the same, "
                f"got {self.layer_windows}; use sliding_window where layers are alike"
            )
        if self.sliding_window is not None:
            raise ValueError("sliding_window and layer_windows are both set; remove one")

    def for_context(self, max_tokens: int) -> ModelConfig:
        """The config of this model when no context is longer than `max_tokens`.

        A longrope model then rotates as it was first trained, if that is enough: its keys are
        kept rotated, so that the choice cannot follow each context's length.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return self
        if max_tokens > scaling.original_max_position_embeddings:
            return self
        return replace(self, rope_scaling=replace(scaling, long_factors=scaling.factors))
