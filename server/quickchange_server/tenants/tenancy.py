"""Construction of the tenants' parts by the settings, and whether requests need an API key."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from quickchange_server.config import Settings
from quickchange_server.errors import SettingError
from quickchange_server.observability.tenant_metrics import TenantMetrics
from quickchange_server.storage.database import Database
from quickchange_server.tenants.accounting import KeyAccounting, TenantAccounting
from quickchange_server.tenants.keyring import Keyring
from quickchange_server.tenants.limits import Limiter
from quickchange_server.tenants.shared_limits import CounterCalls, SharedLimits
from quickchange_server.tenants.usage_log import UsageLog


@dataclass(frozen=True, slots=True)
class Tenants:
    """The keyring and the accounting; `keyring` is None if requests need no API key."""

    keyring: Keyring | None
    books: TenantAccounting
    shared: SharedLimits | None = None  # None: this server's limits are its own

    @classmethod
    def make(
        cls,
        settings: Settings,
        database: Database,
        registry: CollectorRegistry,
        *,
        keyed: bool,
        counter: CounterCalls | None = None,
    ) -> Tenants:
        """Build the parts, on the event loop. `keyed`: requests need an API key, see
        `asks_for_keys`. `counter`: the limits' counter of all replicas, where there are several."""
        metrics = TenantMetrics(registry, settings.metrics_adapters, shared=counter is not None)
        if not keyed:
            return cls(None, TenantAccounting(metrics, None))
        keyring = Keyring(database, salted=settings.tenant_cache)
        shared = None if counter is None else SharedLimits(counter, metrics.counted_alone)
        keys = KeyAccounting(keyring, shared or Limiter(), UsageLog(database))
        return cls(keyring, TenantAccounting(metrics, keys), shared)

    async def close(self) -> None:
        """Tell the other replicas' counter what has ended."""
        if self.shared is not None:
            await self.shared.close()


def asks_for_keys(settings: Settings) -> bool:
    """True if requests need an API key.

    Raises SettingError if the settings contradict each other, or open the server to other machines
    without `allow_unauthenticated`.
    """
    reachable = settings.reachable
    if settings.api_keys and settings.allow_unauthenticated:
        raise SettingError(
            "allow_unauthenticated: contradicts api_keys; give one of --api-keys and "
            "--allow-unauthenticated",
            param="allow_unauthenticated",
        )
    if settings.api_keys is False and reachable and not settings.allow_unauthenticated:
        raise SettingError(
            f"api_keys: off, while {settings.host} can be reached by others, who could use the "
            "server and change its adapters; leave --no-api-keys out, or say "
            "--allow-unauthenticated as well",
            param="api_keys",
        )
    if settings.api_keys is None:
        return reachable and not settings.allow_unauthenticated
    return settings.api_keys
