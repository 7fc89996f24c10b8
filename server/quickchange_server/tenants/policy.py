"""Whether requests need an API key, by the settings."""

from __future__ import annotations

from quickchange_server.addresses import is_loopback
from quickchange_server.errors import SettingError
from quickchange_server.settings import Settings


def asks_for_keys(settings: Settings) -> bool:
    """Raises SettingError where the settings contradict each other, or leave the server open to
    others without saying so."""
    reachable = not is_loopback(settings.host)
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
