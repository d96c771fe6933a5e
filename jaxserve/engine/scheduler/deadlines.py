"""When a request's tokens are due."""

from __future__ import annotations

from jaxserve.engine.request import Request, ServiceObjective

DEFAULT_OBJECTIVE = ServiceObjective(ttft_s=6.0, tbt_s=0.1)


def first_token_deadline_s(request: Request, objective: ServiceObjective) -> float:
    return request.arrival_s + objective.ttft_s


def next_token_deadline_s(
    request: Request, objective: ServiceObjective, start_s: float, *, strict_gaps: bool = False
) -> float:
    """When the token is due that the request's newest planned decode gives.

    Token n (from 0) is due at arrival + TTFT + n * TBT, so a request that is
    ahead of that has time to spare. One that is behind can't make it up; its
    tokens are due one TBT after another. `strict_gaps` asks that of all.

    Args:
        start_s: when the step begins that holds this decode. A token of an
            earlier step that is not committed is taken to come just then.
    """
    num_planned = len(request.output_token_ids) + request.num_pending_tokens
    is_known = request.num_pending_tokens == 1 and request.last_token_s is not None
    before_s = request.last_token_s if is_known and request.last_token_s is not None else start_s
    after_last_s = before_s + objective.tbt_s
    if strict_gaps:
        return after_last_s
    first_s = first_token_deadline_s(request, objective)
    return max(first_s + (num_planned - 1) * objective.tbt_s, after_last_s)
