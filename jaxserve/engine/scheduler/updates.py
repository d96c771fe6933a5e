"""Reading a step's results: from arrays in row order to per-request values."""

from __future__ import annotations

from jaxserve.engine.plan import NO_TOKEN, Chunk, StepResults
from jaxserve.engine.request import FinishReason, Request, TokenLogprobs


class ResultReader:
    """Walks the rows of `StepResults` in the order of the plan's chunks.

    Arrays become lists once for the whole step; those of logprobs only when a
    request wants some.
    """

    def __init__(self, results: StepResults) -> None:
        self._results = results
        self._token_ids: list[int] = results.token_ids.tolist()
        self._lacks_tokens = NO_TOKEN in self._token_ids
        self._row = 0

    def has_no_token(self, chunk: Chunk) -> bool:
        """Whether a row of the chunk, which comes next, had no finite logits."""
        end = self._row + len(chunk.logprob_targets) + chunk.samples
        return self._lacks_tokens and NO_TOKEN in self._token_ids[self._row : end]

    def skip(self, chunk: Chunk) -> None:
        self._row += len(chunk.logprob_targets) + chunk.samples

    def next_token(self) -> int:
        """Moves on to the next row; its token."""
        row = self._row
        self._row = row + 1
        return self._token_ids[row]

    def logprobs(self, num_top: int) -> TokenLogprobs:
        """Logprobs of the token just read, with the `num_top` most likely ones."""
        row, results = self._row - 1, self._results
        top_ids: list[int] = results.top_ids[row, :num_top].tolist()
        top_logprobs: list[float] = results.top_logprobs[row, :num_top].tolist()
        return TokenLogprobs(
            token_id=self._token_ids[row],
            logprob=float(results.logprobs[row]),
            rank=int(results.ranks[row]),
            top=tuple(zip(top_ids, top_logprobs, strict=True)),
        )


def read_prompt_logprobs(
    reader: ResultReader, request: Request, chunk: Chunk
) -> tuple[TokenLogprobs, ...]:
    """Logprobs of the chunk's `logprob_targets`."""
    num_top = request.sampling.prompt_logprobs or 0
    entries = []
    for _ in chunk.logprob_targets:
        reader.next_token()
        entries.append(reader.logprobs(num_top))
    return tuple(entries)


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
