"""Accounting of requests by tenant: limits at admission, usage and metrics at the end."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from quickchange_server.frontend.request_observers import Completed, Opened
from quickchange_server.observability.tenant_metrics import TenantMetrics
from quickchange_server.tenants.key import Limits
from quickchange_server.tenants.keyring import Keyring
from quickchange_server.tenants.limits import Admitted, LimitedError, TooLargeError
from quickchange_server.tenants.usage_log import UsageLog


class LimitKeeper(Protocol):
    """Limits of API keys: `Limiter` for one server, `SharedLimits` for a replica of several."""

    async def admit(
        self, key: str, limits: Limits, prompt_tokens: int, new_tokens: int
    ) -> Admitted:
        """Charge a request. Raises TooLargeError or LimitedError, and then charges nothing, as
        where the wait is cancelled."""

    def end(self, admitted: Admitted, tokens: int) -> None: ...
    def undo(self, admitted: Admitted) -> None: ...


@dataclass
class KeyAccounting:
    """The parts that exist only if the server requires API keys."""

    keyring: Keyring
    limits: LimitKeeper
    usage: UsageLog


@dataclass
class TenantAccounting:
    """Request observer for tenants. Without `keys` (no key is required) it only updates metrics.

    Shadow requests are the server's own and count for no tenant.
    """

    metrics: TenantMetrics
    keys: KeyAccounting | None
    clock: Callable[[], float] = time.time  # Unix seconds
    _admitted: dict[str, Admitted] = field(default_factory=dict)  # by request id

    def opened(self, opened: Opened) -> Awaitable[None] | None:
        """Charge a request to its key's limits.

        Raises TooLargeError, LimitedError or UnauthenticatedError.
        """
        key = opened.caller.key
        if self.keys is None or key is None or _is_shadow(opened):
            return None
        return self._admit(self.keys, key, opened)

    async def _admit(self, keys: KeyAccounting, key: str, opened: Opened) -> None:
        limits = keys.keyring.key(key).terms.limits
        try:
            self._admitted[opened.request_id] = await keys.limits.admit(
                key, limits, opened.prompt_tokens, opened.max_tokens
            )
        except (TooLargeError, LimitedError) as error:
            self.metrics.limited(opened.caller.tenant, error.limit)
            raise

    def completed(self, completed: Completed) -> Awaitable[None] | None:
        opened = completed.opened
        if _is_shadow(opened):
            return None
        self.metrics.completed(completed)
        admitted = self._admitted.pop(opened.request_id, None)
        if self.keys is None or admitted is None:
            return None
        if completed.ending == "refused":
            self.keys.limits.undo(admitted)
            return None
        self.keys.limits.end(admitted, opened.prompt_tokens + completed.completion_tokens)
        return self.keys.usage.add(completed, admitted.key, self.clock())


def _is_shadow(opened: Opened) -> bool:
    return opened.assignment is not None and opened.assignment.shadow
