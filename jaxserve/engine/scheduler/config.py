"""Limits that the scheduler plans within."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxserve.errors import ConfigError

MAX_DRAFTED_SEQS = 8
"""Sequences of a step whose drafts have rows through the LM head beside those of all decodes. In
a larger batch a row costs as much as what it can save."""


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """Drafts that follow from a request's own text."""

    num_tokens: int = 4
    """Most tokens of a draft."""
    lookup_max: int = 4
    """Longest match of the last tokens that counts; the longest one is taken."""
    lookup_min: int = 3
    """Shortest match that gives a draft."""
    may_grow_step: bool = True
    """Drafts may take a step into a larger bucket. False where all rows of a bucket cost alike."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_tokens <= 16:
            raise ConfigError(f"--num-speculative-tokens must be in 1 to 16, not {self.num_tokens}")
        if not 1 <= self.lookup_min <= self.lookup_max <= 16:
            raise ConfigError(
                f"--prompt-lookup-min {self.lookup_min} and --prompt-lookup-max "
                f"{self.lookup_max} must be in 1 to 16, the first not above the second"
            )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Validated on construction; a message names the flag to change."""

    num_pages: int
    max_model_len: int
    """Most tokens (prompt + output) of one sequence."""
    max_num_seqs: int = 32
    """Slots: sequences that run at once."""
    token_budget: int = 128
    """Most rows of a step (tau)."""
    buckets: tuple[int, ...] = (4, 32, 128)
    """Row counts of the compiled steps, ascending; the last is >= token_budget."""
    page_size: int = 16
    watermark: float = 0.01
    """Fraction of the pages that admission leaves free for growth."""
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    """Prompt tokens that may wait."""
    max_in_flight: int = 2
    """Plans in flight at once."""
    chain_decodes: bool = True
    """A sequence may decode in consecutive in-flight steps, since its last
    token stays on the device. False for pipeline stages, where it must return
    first."""
    stream_chunks: bool = False
    """A prompt's next chunk may follow the last one into the pipe, where decodes
    don't. Follows from `chain_decodes`."""
    max_seqs_per_step: int | None = None
    """Most sequences of one micro-batch, so that pipeline stages share the
    running ones. None: all of them."""
    prefix_caching: bool = True
    policy: str = "sarathi"
    speculation: SpeculationConfig | None = None
    """None: every decode is one row."""

    @property
    def num_watermark_pages(self) -> int:
        return math.floor(self.watermark * self.num_pages)

    @property
    def max_pages_per_seq(self) -> int:
        return math.ceil(self.max_model_len / self.page_size)

    @property
    def num_sample_rows(self) -> int:
        """Most LM-head rows of any step."""
        if self.speculation is None:
            return self.max_num_seqs
        num_drafted = min(self.max_num_seqs, MAX_DRAFTED_SEQS)
        return self.max_num_seqs + num_drafted * self.speculation.num_tokens

    def max_sample_rows(self, num_rows_bucket: int) -> int:
        """LM-head rows of the executable with that many rows."""
        return min(self.num_sample_rows, num_rows_bucket)

    def __post_init__(self) -> None:
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)):
            raise ConfigError(f"--buckets must be ascending and not empty, not {self.buckets}")
        if self.token_budget > self.buckets[-1]:
            raise ConfigError(
                f"--token-budget {self.token_budget} needs a bucket of at least that many rows; "
                f"the largest of --buckets is {self.buckets[-1]}"
            )
        if self.max_num_seqs > self.token_budget:
            raise ConfigError(
                f"--max-num-seqs {self.max_num_seqs} must not exceed --token-budget "
                f"{self.token_budget}: every running sequence decodes in every step"
            )
        if self.max_num_seqs < 1 or self.page_size < 1:
            raise ConfigError("--max-num-seqs and --page-size must be positive")
        if self.max_model_len < 2:
            raise ConfigError("--max-model-len must be at least 2: a prompt and an output token")
        if not 0.0 <= self.watermark < 0.5:
            raise ConfigError(f"--watermark must be in [0, 0.5), not {self.watermark}")
        if self.max_in_flight < 1:
            raise ConfigError("max_in_flight must be at least 1")
        if self.speculation is not None and self.policy != "sarathi":
            raise ConfigError(
                f"--speculative-method has no effect on --policy {self.policy}: leave one of the "
                "two out, or choose --policy sarathi"
            )
        if self.max_seqs_per_step is not None:
            self._check_micro_batches(self.max_seqs_per_step)
        needed = self.max_pages_per_seq + self.num_watermark_pages
        if self.num_pages < needed:
            raise ConfigError(
                f"the KV pool has {self.num_pages} pages of {self.page_size} tokens but one "
                f"sequence of --max-model-len {self.max_model_len} needs {needed}: raise "
                "--kv-cache-bytes or lower --max-model-len"
            )

    def _check_micro_batches(self, max_seqs_per_step: int) -> None:
        # The oldest sequences would be in every step, and the others in none.
        if self.chain_decodes:
            raise ConfigError("max_seqs_per_step needs chain_decodes=False")
        if max_seqs_per_step * self.max_in_flight < self.max_num_seqs:
            raise ConfigError(
                f"{self.max_in_flight} micro-batches of {max_seqs_per_step} sequences don't hold "
                f"--max-num-seqs {self.max_num_seqs}"
            )
