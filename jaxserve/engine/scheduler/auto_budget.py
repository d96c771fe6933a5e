"""The token budget that keeps an objective in the hardest step that a configuration expects."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.engine.scheduler.budget import choose_token_budget
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.step_cost import StepCost


def auto_token_budget(
    config: SchedulerConfig,
    cost: StepCost,
    slo_tbt_s: float,
    candidates: Sequence[int],
    *,
    margin: float,
) -> int:
    """The largest candidate whose full step keeps the objective with every slot decoding at half
    of the longest context, as far as the pages reach, and a chunk at the end of that context: a
    step that comes with each long prompt.

    Args:
        candidates, margin: see `choose_token_budget`.

    Raises ConfigError if no candidate keeps it.
    """
    in_pool = config.num_pages * config.page_size
    half = config.max_model_len // 2
    return choose_token_budget(
        cost,
        slo_tbt_s,
        candidates,
        num_decodes=config.max_num_seqs,
        decode_context=min(config.max_num_seqs * half, in_pool),
        chunk_start=config.max_model_len,
        margin=margin,
    )
