"""Reading a step's results: from arrays in row order to per-request values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxserve.engine.plan import Chunk, StepResults
from jaxserve.engine.request import FinishReason, Request, TokenLogprobs, TokenUpdate


@dataclass(frozen=True, slots=True)
class StepUpdates:
    """What a committed step changed, in row order; nothing of requests that had finished before.

    Nearly every decode gives a token and nothing else. Those stay in columns, and iterating makes
    their updates: the loop does so when the device has its next step.
    """

    decoding: Sequence[Request]
    """Owners of the first rows, which are decodes."""
    token_ids: Sequence[int]
    """What each row gave."""
    special: Mapping[int, TokenUpdate | None]
    """By row: decodes that gave more than a token (or nothing, for None)."""
    prefilled: Sequence[TokenUpdate]
    """Of prefill chunks."""

    def __iter__(self) -> Iterator[TokenUpdate]:
        special, new_update, none = self.special, tuple.__new__, ()
        for row, (request, token_id) in enumerate(
            zip(self.decoding, self.token_ids, strict=False)  # Prefills' rows come after.
        ):
            if row not in special:
                fields = (request, (token_id,), none, none, None, None)
                yield new_update(TokenUpdate, fields)
            elif (update := special[row]) is not None:
                yield update
        yield from self.prefilled


class ResultReader:
    """The rows of `StepResults` as Python values, in the order of the plan's chunks.

    Arrays become lists once for the whole step; those of logprobs only when a
    request wants some.
    """

    def __init__(self, results: StepResults) -> None:
        self._results = results
        self.token_ids: list[int] = results.token_ids.tolist()
        """`NO_TOKEN` where a row had no finite logits."""

    def logprobs(self, row: int, num_top: int) -> TokenLogprobs:
        """Logprobs of a row's token, with the `num_top` most likely ones."""
        results = self._results
        top_ids: list[int] = results.top_ids[row, :num_top].tolist()
        top_logprobs: list[float] = results.top_logprobs[row, :num_top].tolist()
        return TokenLogprobs(
            token_id=self.token_ids[row],
            logprob=float(results.logprobs[row]),
            rank=int(results.ranks[row]),
            top=tuple(zip(top_ids, top_logprobs, strict=True)),
        )


def read_prompt_logprobs(
    reader: ResultReader, request: Request, chunk: Chunk, row: int
) -> tuple[TokenLogprobs, ...]:
    """Logprobs of the chunk's `logprob_targets`; its rows begin at `row`."""
    num_top = request.sampling.prompt_logprobs or 0
    return tuple(reader.logprobs(row + i, num_top) for i in range(len(chunk.logprob_targets)))


def joined_updates(updates: Sequence[TokenUpdate]) -> TokenUpdate:
    """One update of a request, with the tokens of these in turn; there is at least one."""
    return updates[-1]._replace(
        token_ids=tuple(token_id for update in updates for token_id in update.token_ids),
        logprobs=tuple(entry for update in updates for entry in update.logprobs),
    )


def finish_reason_after(request: Request, token_id: int) -> FinishReason | None:
    """Whether `token_id`, which `request` has just got, ends it, and why.

    Stop ids count once `min_tokens` tokens came before.
    """
    num_output = len(request.output_token_ids)
    if token_id in request.stop_token_ids and num_output > request.generation.sampling.min_tokens:
        return FinishReason.STOP
    if num_output >= request.max_tokens:
        return FinishReason.LENGTH
    return None


def num_plain_outputs(request: Request, page_size: int) -> int:
    """Output tokens of a decoding request up to which its decodes give a token and nothing else.

    The decode after that completes a page, reports logprobs, gives the last token, or one that
    decides of the next one's mask.
    """
    num_output = len(request.output_token_ids)
    if request.sampling.logprobs is not None or request.masks is not None:
        return num_output
    num_to_page_end = -request.num_tokens % page_size
    return min(num_output + num_to_page_end, request.max_tokens - 1)


def only_fills_page(request: Request, token_id: int, end: int, page_size: int) -> bool:
    """Whether a decode of the position before `end` completes a page and gives a token, which
    comes next, and nothing else. One decode in `page_size` does."""
    return (
        end % page_size == 0
        and token_id not in request.special_token_ids
        and request.finish_reason is None
        and len(request.output_token_ids) + 1 < request.max_tokens
        and request.masks is None
        and request.generation.sampling.logprobs is None
    )
