"""The demo: a small base model, adapters and Turbo heads trained for it, and their tasks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_training.demo.demo_base import DemoBaseError, ensure_demo_base
from quickchange_training.demo.tasks import TASKS

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec
    from quickchange_store.store import Store


@dataclass(frozen=True)
class DemoAdapter:
    """An adapter that comes with the package."""

    name: str
    path: Path  # a PEFT directory with recipe.json beside, or a directory of Turbo heads
    description: str
    example_prompt: str  # a user message


DEMO_ADAPTERS: dict[str, DemoAdapter] = {
    name: DemoAdapter(
        name, Path(__file__).parent / "adapters" / name, task.description, task.sample_prompt
    )
    for name, task in TASKS.items()
}

_CHAT_PROMPT = "Give me tips for someone who is new to gardening."

DEMO_HEADS: dict[str, DemoAdapter] = {
    f"{subject}-heads": DemoAdapter(
        f"{subject}-heads",
        Path(__file__).parent / "adapters" / f"{subject}-heads",
        f"Turbo heads for {what}",
        prompt,
    )
    for subject, what, prompt in [
        *((name, name, task.sample_prompt) for name, task in TASKS.items()),
        ("base", "the base model", _CHAT_PROMPT),
    ]
}


@dataclass(frozen=True)
class DemoAlias:
    """A name that binds heads to what they draft for."""

    name: str
    target: str
    turbo: str | None  # None: the target's own heads
    description: str
    example_prompt: str


DEMO_ALIASES: dict[str, DemoAlias] = {
    f"{subject}-turbo": DemoAlias(
        f"{subject}-turbo",
        subject if subject in DEMO_ADAPTERS else heads.name,
        heads.name if subject in DEMO_ADAPTERS else None,
        f"{subject} with {heads.name}",
        heads.example_prompt,
    )
    for subject, heads in ((name.removesuffix("-heads"), h) for name, h in DEMO_HEADS.items())
}


def demo_store_folder() -> Path:
    """`$XDG_DATA_HOME/quickchange/demo`, by default under `~/.local/share`."""
    xdg = os.environ.get("XDG_DATA_HOME")
    data = Path(xdg) if xdg else Path.home() / ".local" / "share"
    return data / "quickchange" / "demo"


def publish_demo_adapters(store: Store, base: BaseSpec) -> list[str]:
    """Add the demo's adapters, heads and aliases that `store` lacks; their names.

    A name that is taken stays as it is, whoever published it. Raises StoreError.
    """
    from quickchange_store.importing import add_adapter

    taken = {*store.names(), *store.aliases()}
    missing = [a for name, a in {**DEMO_ADAPTERS, **DEMO_HEADS}.items() if name not in taken]
    for adapter in missing:
        add_adapter(store, adapter.name, adapter.path, base)
    unbound = [alias for name, alias in DEMO_ALIASES.items() if name not in taken]
    for alias in unbound:
        store.alias(alias.name, alias.target, turbo=alias.turbo)
    return [a.name for a in missing] + [alias.name for alias in unbound]


__all__ = [
    "DEMO_ADAPTERS",
    "DEMO_ALIASES",
    "DEMO_HEADS",
    "DemoAdapter",
    "DemoAlias",
    "DemoBaseError",
    "demo_store_folder",
    "ensure_demo_base",
    "publish_demo_adapters",
]
