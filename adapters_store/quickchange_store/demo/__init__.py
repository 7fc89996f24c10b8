"""The demo: a small base model, three adapters trained for it, and the tasks they learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.demo.base import DemoBaseError, ensure_demo_base
from quickchange_store.demo.tasks import TASKS

if TYPE_CHECKING:
    from quickchange_store.canonical import BaseSpec
    from quickchange_store.store import Store


@dataclass(frozen=True)
class DemoAdapter:
    """An adapter that comes with the package."""

    name: str
    path: Path  # a PEFT directory, with recipe.json beside
    description: str
    example_prompt: str  # a user message


DEMO_ADAPTERS: dict[str, DemoAdapter] = {
    name: DemoAdapter(
        name, Path(__file__).parent / "adapters" / name, task.description, task.sample_prompt
    )
    for name, task in TASKS.items()
}


def publish_demo_adapters(store: Store, base: BaseSpec) -> list[str]:
    """Add the demo adapters that `store` lacks; their names. Raises StoreError.

    A name that is taken stays as it is, whoever published it.
    """
    from quickchange_store.importing import add_adapter

    taken = {*store.names(), *store.aliases()}
    missing = [adapter for name, adapter in DEMO_ADAPTERS.items() if name not in taken]
    for adapter in missing:
        add_adapter(store, adapter.name, adapter.path, base)
    return [adapter.name for adapter in missing]


__all__ = [
    "DEMO_ADAPTERS",
    "DemoAdapter",
    "DemoBaseError",
    "ensure_demo_base",
    "publish_demo_adapters",
]
