"""Puts the tenants' parts together, by the settings."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from quickchange_server.metrics_tenants import TenantMetrics
from quickchange_server.settings import Settings
from quickchange_server.storage.database import Database
from quickchange_server.tenants.books import KeyBooks, TenantBooks
from quickchange_server.tenants.keyring import Keyring
from quickchange_server.tenants.limits import Limiter
from quickchange_server.tenants.usage import UsageLog


@dataclass(frozen=True, slots=True)
class Tenants:
    """`keyring` is None where no request needs a key."""

    keyring: Keyring | None
    books: TenantBooks

    @classmethod
    def make(
        cls, settings: Settings, database: Database, registry: CollectorRegistry, *, keyed: bool
    ) -> Tenants:
        """`keyed`: requests need an API key."""
        metrics = TenantMetrics(registry, settings.metrics_adapters)
        if not keyed:
            return cls(None, TenantBooks(metrics, None))
        keyring = Keyring(database, salted=settings.tenant_cache)
        return cls(keyring, TenantBooks(metrics, KeyBooks(keyring, Limiter(), UsageLog(database))))
