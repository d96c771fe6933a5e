"""TenantMeter: what each tenant uses, held against its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxserve.engine.request import GenerationRequest, RequestOutput
from jaxserve.errors import OverLimit
from jaxserve.server.access.tenant import Tenant
from jaxserve.server.access.token_bucket import TokenBucket

SECONDS_A_MINUTE = 60.0
BUSY_RETRY_S = 1.0
"""When to try again, if that depends on how long other requests take."""


@dataclass(slots=True)
class TenantUsage:
    """Of one tenant since the server started."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_refused: dict[str, int] = field(default_factory=dict)
    """By the limit's name."""
    has_token: dict[str, bool] = field(default_factory=dict)
    """Of each request that has begun and not ended, whether it has a token."""
    bucket: TokenBucket | None = None

    @property
    def num_open(self) -> int:
        return len(self.has_token)

    @property
    def num_queued(self) -> int:
        return sum(not started for started in self.has_token.values())


class TenantMeter:
    """Asked before each request, and told of each output. On the event loop alone.

    Args:
        tenants: the ones that exist now, by name.
        clock: in seconds.
    """

    def __init__(
        self, tenants: Callable[[], Mapping[str, Tenant]], clock: Callable[[], float]
    ) -> None:
        self._tenants = tenants
        self._clock = clock
        self.usage: dict[str, TenantUsage] = {}

    def admit(self, request: GenerationRequest) -> None:
        """Counts a request in. Raises OverLimit."""
        tenant = self._tenants().get(request.account.tenant)
        if tenant is None:
            return
        usage = self.usage.setdefault(tenant.name, TenantUsage())
        try:
            self._check(tenant, usage, len(request.prompt_token_ids))
        except OverLimit as error:
            usage.num_refused[error.limit] = usage.num_refused.get(error.limit, 0) + 1
            raise
        self._take(usage, len(request.prompt_token_ids))
        usage.num_prompt_tokens += len(request.prompt_token_ids)
        usage.has_token[request.request_id] = False

    def withdraw(self, request: GenerationRequest) -> None:
        """The request was counted in and then not taken."""
        usage = self.usage.get(request.account.tenant)
        if usage is not None and usage.has_token.pop(request.request_id, None) is not None:
            usage.num_prompt_tokens -= len(request.prompt_token_ids)
            self._take(usage, -len(request.prompt_token_ids))

    def note(self, request: GenerationRequest, output: RequestOutput) -> None:
        """An output of a request that was counted in."""
        usage = self.usage.get(request.account.tenant)
        if usage is None or request.request_id not in usage.has_token:
            return
        if output.token_ids:
            usage.has_token[request.request_id] = True
            usage.num_output_tokens += len(output.token_ids)
            self._take(usage, len(output.token_ids))
        if output.finish_reason is not None:
            del usage.has_token[request.request_id]
            if output.usage is not None:
                usage.num_cached_tokens += output.usage.num_cached_tokens

    def _check(self, tenant: Tenant, usage: TenantUsage, num_prompt_tokens: int) -> None:
        most = tenant.max_concurrent_requests
        if most is not None and usage.num_open >= most:
            raise OverLimit(
                "max_concurrent_requests",
                f"{usage.num_open} of your requests run or wait already; at most {most} may",
                BUSY_RETRY_S,
            )
        most = tenant.max_queued_requests
        if most is not None and usage.num_queued >= most:
            raise OverLimit(
                "max_queued_requests",
                f"{usage.num_queued} of your requests wait already; at most {most} may",
                BUSY_RETRY_S,
            )
        usage.bucket = self._bucket(tenant, usage.bucket)
        if usage.bucket is not None:
            wait_s = usage.bucket.wait_s(num_prompt_tokens, self._clock())
            if wait_s > 0:
                raise OverLimit(
                    "tokens_per_minute",
                    f"you have used your {tenant.tokens_per_minute} tokens a minute",
                    wait_s,
                )

    def _bucket(self, tenant: Tenant, before: TokenBucket | None) -> TokenBucket | None:
        """The tenant's bucket; a new one when its limits have changed, without a new burst."""
        if tenant.tokens_per_minute is None:
            return None
        rate = tenant.tokens_per_minute / SECONDS_A_MINUTE
        burst = float(tenant.burst_tokens or tenant.tokens_per_minute)
        now_s = self._clock()
        if before is None:
            return TokenBucket(rate, burst, now_s)
        if (before.tokens_per_s, before.burst) == (rate, burst):
            return before
        bucket = TokenBucket(rate, burst, now_s)
        bucket.take(round(max(0.0, burst - before.level(now_s))), now_s)
        return bucket

    def _take(self, usage: TenantUsage, num_tokens: int) -> None:
        if usage.bucket is not None:
            usage.bucket.take(num_tokens, self._clock())
