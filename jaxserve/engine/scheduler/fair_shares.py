"""FairShares: what each tenant has got, so that the one that got least is next.

A counter for each tenant, as in "Fairness in Serving Large Language Models" (OSDI 2024): tokens of
its prompts and answers over its weight. A tenant that comes back after a pause begins at the least
of those that are busy, so that nobody saves up turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxserve.engine.request import Request


class FairShares:
    """
    Args:
        running: by request id; read whenever shares are compared, so that tokens count as they
            come and no step has to tell of them.
    """

    def __init__(self, running: Mapping[str, Request]) -> None:
        self._running = running
        self._charged: dict[str, float] = {}
        """Of requests that have ended."""

    def charge(self, request: Request) -> None:
        """A request that was running has ended."""
        tenant = request.generation.account.tenant
        if tenant:
            self._charged[tenant] = self._charged.get(tenant, 0.0) + _service(request)

    def join(self, tenant: str, waiting: Iterable[str]) -> None:
        """A tenant begins to wait, of which nothing waited.

        Args:
            waiting: the tenants that wait already.
        """
        if not tenant:
            return
        running = {request.generation.account.tenant for request in self._running.values()}
        if tenant in running:
            return
        service = self.service()
        busy = [service.get(other, 0.0) for other in running.union(waiting) if other]
        if busy:
            self._charged[tenant] = max(self._charged.get(tenant, 0.0), min(busy))

    def service(self) -> dict[str, float]:
        """What each tenant has got; none for those that got nothing."""
        service = dict(self._charged)
        for request in self._running.values():
            tenant = request.generation.account.tenant
            service[tenant] = service.get(tenant, 0.0) + _service(request)
        return service


def _service(request: Request) -> float:
    num_tokens = request.num_prompt_tokens - request.num_cached_tokens
    return (num_tokens + len(request.output_token_ids)) / request.generation.account.weight
