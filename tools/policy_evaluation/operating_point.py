"""Where a step is timed: the model, the token budget and the load that suit a machine."""

from __future__ import annotations

from dataclasses import dataclass

VOCAB_SIZE = 256
"""One token a byte."""


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """The same for every policy. Tokens and rows are counts."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    context: int
    """Tokens of the longest sequence."""
    long_prompt: int
    """Tokens: 16 token budgets and a half."""
    token_budget: int
    max_num_seqs: int
    num_steady: int
    """Decodes that run beside long prompts."""
    small_buckets: tuple[int, ...]
    """Rows of steps with decodes alone."""
    whole_buckets: tuple[int, ...]
    """Rows of steps that hold whole prompts, which no policy that cuts them uses."""
    control_budgets: tuple[int, ...]
    """SL4: budgets to choose from."""
    slack_budget: int
    """SL5: the fixed budget, whose step keeps the stricter class."""
    slack_max_rows: int
    """SL5: the most that the slack budget may take."""
    pool_bytes: int
    is_file: bool
    """The weights come from a folder, so that a server of its own can load them too; else
    they are made on the device."""
    num_engine_cores: int | None = None
    """Cores that run the steps; everything else runs on the others. None shares all."""

    @property
    def token_budgets(self) -> tuple[int, ...]:
        return tuple(
            sorted(
                {self.token_budget, *self.control_budgets, self.slack_budget, self.slack_max_rows}
            )
        )

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(sorted({*self.small_buckets, *self.token_budgets, *self.whole_buckets}))


CPU = OperatingPoint(
    name="cpu",
    hidden_size=512,
    intermediate_size=8192,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    dtype="float32",
    context=2144,
    long_prompt=2112,
    token_budget=128,
    max_num_seqs=20,
    num_steady=16,
    small_buckets=(4, 20),
    whole_buckets=(1024, 2144),
    control_budgets=(64, 128, 256, 512),
    slack_budget=64,
    slack_max_rows=512,
    pool_bytes=64 << 20,
    is_file=True,
    num_engine_cores=1,
)
"""13 million parameters. One core, so that arithmetic bounds a step early and the host's work
never takes a core away from it. One layer, since XLA copies the weights of scanned layers
before it uses them, which adds to every step what no row pays for. Attention is narrow, so that
linear layers dominate at this context as they do at 8k tokens in a model of several billion
parameters."""

GPU = OperatingPoint(
    name="gpu",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    context=8704,
    long_prompt=8448,
    token_budget=512,
    max_num_seqs=32,
    num_steady=16,
    small_buckets=(32,),
    whole_buckets=(8704,),
    control_budgets=(512,),
    slack_budget=512,
    slack_max_rows=512,
    pool_bytes=12 << 30,
    is_file=False,
)
"""Llama-3-8B but for its vocabulary: 512 rows are where arithmetic begins to bound a step."""

OPERATING_POINTS = {point.name: point for point in (CPU, GPU)}
