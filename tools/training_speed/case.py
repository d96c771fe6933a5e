"""What is trained and how: the same for every engine. Imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """A model's shape, with tied embeddings, and a batch."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    batch_size: int
    seq_len: int
    learning_rate: float = 1e-4
    weight_decay: float = 0.01

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Targets of a step."""
        return self.batch_size * self.seq_len

    @property
    def num_matrix_params(self) -> int:
        """Weights that every token is multiplied with, the head included."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @property
    def step_flops(self) -> float:
        """Floating-point operations that a step needs: six a weight and token, and attention
        of which the causal half counts. Nothing that is computed twice is counted twice."""
        attention = 6 * self.num_layers * self.hidden_size * self.seq_len
        return float(self.num_tokens * (6 * self.num_matrix_params + attention))

    def hf_config(self) -> dict[str, object]:
        """The same shape as a Hugging Face `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }

    def to_fields(self) -> dict[str, object]:
        """For JSON; `Case(**fields)` is the inverse."""
        return asdict(self)


CASES = {
    case.name: case
    for case in (
        Case("smollm2-135m", 49152, 576, 1536, 30, 9, 3, batch_size=2, seq_len=512),
        Case("llama-10m", 8192, 320, 960, 6, 5, 5, batch_size=8, seq_len=256),
    )
}
