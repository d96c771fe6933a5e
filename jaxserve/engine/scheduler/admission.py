"""Pages at admission: which a request finds, which it gets, which stay free; and how others
find those that it fills."""

from __future__ import annotations

from jaxserve.engine.pages import page_key, root_key
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.budget import StepBudget
from jaxserve.engine.scheduler.rules import PageGrant, PolicyRules
from jaxserve.engine.scheduler.state import SchedulerState


def find_cached_pages(state: SchedulerState, request: Request) -> list[int]:
    """Registered pages of its longest known prefix, at least one token short of all."""
    if not state.config.prefix_caching or request.has_unscored_prompt:
        return []
    size = state.config.page_size
    num_pages = (request.num_tokens - 1) // size
    extend_page_keys(request, num_pages, size)
    token_ids = request.known_token_ids(0, num_pages * size)
    return state.pages.find_prefix(
        request.page_keys[:num_pages], token_ids, salt=request.generation.cache_salt
    )


def extend_page_keys(request: Request, num_pages: int, page_size: int) -> None:
    """Makes sure that `request.page_keys` covers its first `num_pages` full pages."""
    for index in range(len(request.page_keys), num_pages):
        start = index * page_size
        page_key_at(request, index, request.known_token_ids(start, start + page_size))


def page_key_at(request: Request, index: int, token_ids: tuple[int, ...]) -> bytes:
    """Key of the request's full page `index`, which holds `token_ids`.

    Keys are a chain: those of all pages before it must have been asked for.
    """
    keys = request.page_keys
    if index == len(keys):
        parent = keys[-1] if keys else root_key(request.generation.cache_salt)
        keys.append(page_key(parent, token_ids))
    return keys[index]


def register_pages(state: SchedulerState, request: Request, end: int) -> None:
    """Lets others find the request's full pages up to position `end`, whose tokens are known.

    A prompt's pages may be offered as soon as their step is planned: whoever finds them reads
    them in the same step, which writes before it reads, or in a later one.
    """
    size = state.config.page_size
    num_pages = end // size
    num_registered = request.num_registered_pages
    if num_pages <= num_registered:
        return
    request.num_registered_pages = num_pages
    if state.config.prefix_caching:
        generation = request.generation
        for index in range(num_registered, num_pages):
            token_ids = request.known_token_ids(index * size, (index + 1) * size)
            state.pages.register(
                request.page_ids[index],
                page_key_at(request, index, token_ids),
                token_ids,
                salt=generation.cache_salt,
                owner=generation.account.cache_owner,
            )


def num_granted_pages(
    state: SchedulerState, grant: PageGrant, request: Request, chunk_end: int
) -> int:
    """Pages of its table once it is admitted with a chunk up to `chunk_end`."""
    match grant:
        case PageGrant.KNOWN_TOKENS:
            return state.num_pages_for(request.num_tokens)
        case PageGrant.LONGEST_SEQUENCE:
            return state.config.max_pages_per_seq
        case PageGrant.FIRST_CHUNK:
            return state.num_pages_for(chunk_end)


def num_reserved_pages(
    state: SchedulerState, rules: PolicyRules, budget: StepBudget, request: Request, start: int
) -> int:
    """Pages that must stay available when `request` is admitted.

    The watermark; and for a preempted request at least what the running ones
    can need until its prefill, which begins at `start`, is done. So each life
    that follows a preemption gives a token, and memory never thrashes.
    """
    if rules.page_grant is not PageGrant.KNOWN_TOKENS:
        return 0
    watermark = state.config.num_watermark_pages
    running = state.running.values()
    if not request.num_preemptions or not running or not rules.resume_headroom:
        return watermark
    prefilling = [r for r in running if r.num_computed_tokens < r.num_prefill_tokens]
    backlog = request.num_tokens - start
    backlog += sum(r.num_prefill_tokens - r.num_computed_tokens for r in prefilling)
    num_rows = budget.min_prefill_tokens(len(running))
    if any(r.has_unscored_prompt for r in (request, *prefilling)):
        num_rows = state.config.max_num_seqs - len(running)
    num_steps = -(-backlog // num_rows) + len(prefilling) + 1 + state.config.max_in_flight
    growth = 0
    for r in running:
        num_left = r.max_tokens - len(r.output_token_ids) - r.num_pending_tokens
        end = max(r.num_computed_tokens, r.num_prefill_tokens) + min(num_left, num_steps)
        growth += max(0, state.num_pages_for(end) - len(r.page_ids))
    return max(watermark, growth)
