"""Merging of LoRAs into one, by TIES or DARE, through PEFT's functions.

The result equals PEFT's `add_weighted_adapter`. At equal ranks the A factors and the B factors are
merged separately (PEFT's "ties", "dare_linear", "dare_ties"), each with the square root of the
weight. At different ranks the products s·B·A are merged and cut to the greatest rank by a singular
value decomposition ("ties_svd", ...), which takes long on a large base. TIES: Yadav and others,
2023. DARE: Yu and others, 2024.

A recipe decides the result, DARE's randomness included. As a program
(`python -m quickchange_store.combining.merging`) it reads a job from standard input and publishes
the result without a name, so that a server needs no tensors of its own for it. Knows nothing of
HTTP.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import (
    StoreError,
    StoreUnavailableError,
    UnsupportedFeatureError,
)
from quickchange_store.store import Store

if TYPE_CHECKING:
    import torch

    Merge = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]

MergeStrategy = Literal["ties", "dare_linear", "dare_ties"]
SignMethod = Literal["total", "frequency"]
FORM = 1  # version of the merge's arithmetic: part of every recipe's key
NICENESS = 10  # merging yields the processor to serving


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge's inputs and method. `components`: (digest, weight), in any order."""

    strategy: MergeStrategy
    components: tuple[tuple[str, float], ...]
    density: float  # the share of values kept, above 0 and at most 1
    sign_method: SignMethod = "total"  # TIES elects signs by the sum, or by the count

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", tuple(sorted(self.components)))

    @property
    def key(self) -> str:
        """SHA-256 of the recipe, in hexadecimal."""
        content = json.dumps({"form": FORM, **asdict(self)}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()


def merge(recipe: Recipe, adapters: Sequence[CanonicalAdapter]) -> CanonicalAdapter:
    """The merged adapter; `adapters` are the recipe's components, in its order.

    A module that some adapters lack is merged from the others. Turbo heads are left out. Activated
    ones are merged where all have one invocation, which the result has too. Raises
    UnsupportedFeatureError where an adapter is more than a LoRA, or is activated by other tokens.
    """
    weights = [weight for _, weight in recipe.components]
    for (digest, _), adapter in zip(recipe.components, adapters, strict=True):
        _check_plain(digest, adapter)
        if adapter.invocation != adapters[0].invocation:
            raise UnsupportedFeatureError(
                "it is activated by other tokens than the first of them, or one of the two by none",
                key=digest,
                remedy="merge adapters with equal invocations, or use the strategy "
                '"linear", which lets each begin at its own',
            )
    ranks = {update.rank for adapter in adapters for update in adapter.updates.values()}
    merged = _merged_factors if len(ranks) == 1 else partial(_merged_whole, rank=max(ranks))
    modules = sorted({module for adapter in adapters for module in adapter.updates})
    updates = {}
    for module in modules:
        parts = [
            (adapter.updates[module], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if module in adapter.updates
        ]
        updates[module] = _seeded(recipe, module, partial(merged, parts, _function(recipe)))
    source = {"format": "merged", **asdict(recipe)}
    source["components"] = [list(component) for component in recipe.components]
    first = adapters[0]
    return CanonicalAdapter(
        first.architecture, first.base_name, updates, source, invocation=first.invocation
    )


def derive(store: Store, recipe: Recipe) -> str:
    """Merge what the recipe names, publish it without a name, and return its digest.

    Raises StoreError.
    """
    return store.publish(merge(recipe, [store.load(digest) for digest, _ in recipe.components]))


def _check_plain(digest: str, adapter: CanonicalAdapter) -> None:
    if adapter.composition is not None:
        raise UnsupportedFeatureError(
            "it is a composition", key=digest, remedy="merge the adapters that it is made of"
        )
    if adapter.virtual_tokens:
        raise UnsupportedFeatureError(
            f"it puts {adapter.virtual_tokens} virtual tokens in front of the text, which can't be "
            "merged",
            key=digest,
            remedy="leave it out, or name it beside LoRAs in a composition without a merge",
        )
    if adapter.tokenizer is not None:
        raise UnsupportedFeatureError(
            "it adds tokens or brings a chat template, which what is merged would lack",
            key=digest,
            remedy='use the strategy "linear", by which one such adapter may be composed',
        )
    if not adapter.updates:
        raise UnsupportedFeatureError(
            "it holds Turbo heads alone, which add nothing to merge",
            key=digest,
            remedy="leave it out",
        )
    for module, update in adapter.updates.items():
        if not update.plain or update.bias is not None:
            raise UnsupportedFeatureError(
                f"its update of {module} is more than A and B (DoRA, IA3, a bottleneck or a bias)",
                key=digest,
                remedy='merge plain LoRAs, or use the strategy "linear", which takes every kind',
            )


def _function(recipe: Recipe) -> Merge:
    """PEFT's function for the strategy, of tensors and weights."""
    merge_utils = _peft_merge_utils()
    density = recipe.density
    match recipe.strategy:
        case "ties":
            sign = recipe.sign_method
            return partial(merge_utils.ties, density=density, majority_sign_method=sign)
        case "dare_linear":
            return partial(merge_utils.dare_linear, density=density)
        case "dare_ties":
            sign = recipe.sign_method
            return partial(merge_utils.dare_ties, density=density, majority_sign_method=sign)


def _peft_merge_utils() -> ModuleType:
    """`peft.utils.merge_utils`, which needs torch alone, without the rest of peft."""
    # `import peft` brings transformers, which takes most of the time of a small merge.
    package = importlib.util.find_spec("peft")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "utils" / "merge_utils.py"
    spec = importlib.util.spec_from_file_location("quickchange_peft_merge_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_seed(recipe: Recipe, module: str) -> int:
    """Seed of DARE's choices in one module, from the recipe alone: the same on any machine."""
    content = f"{recipe.key}/{module}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def _seeded(recipe: Recipe, module: str, work: Callable[[], LowRankUpdate]) -> LowRankUpdate:
    import torch

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(module_seed(recipe, module))
        warnings.filterwarnings("ignore", message="The density")  # 1 is allowed: nothing is pruned
        return work()


def _merged_factors(parts: Sequence[tuple[LowRankUpdate, float]], function: Merge) -> LowRankUpdate:
    """A and B, merged separately. The sign of a weight goes to one of them alone."""
    import torch

    scaled = [weight * update.scale for update, weight in parts]
    roots = torch.tensor([math.sqrt(abs(factor)) for factor in scaled])
    signs = torch.tensor([math.copysign(1.0, factor) for factor in scaled])
    a = function([update.a.float() for update, _ in parts], roots * signs)
    b = function([update.b.float() for update, _ in parts], roots)
    return _stored(a, b, parts)


def _merged_whole(
    parts: Sequence[tuple[LowRankUpdate, float]], function: Merge, rank: int
) -> LowRankUpdate:
    """A and B of the merged products s·B·A, cut to `rank`."""
    import torch

    deltas = [update.scale * (update.b.float() @ update.a.float()) for update, _ in parts]
    delta = function(deltas, torch.tensor([weight for _, weight in parts]))
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return _stored(right[:rank], left[:, :rank] * values[:rank], parts)


def _stored(
    a: torch.Tensor, b: torch.Tensor, parts: Sequence[tuple[LowRankUpdate, float]]
) -> LowRankUpdate:
    """The merged factors in the widest dtype of their components."""
    import torch

    dtype = reduce(torch.promote_types, (t.dtype for u, _ in parts for t in (u.a, u.b)))
    return LowRankUpdate(a.to(dtype).contiguous(), b.to(dtype).contiguous(), 1.0)


# --- as a program -------------------------------------------------------------------------------


def job(store: Store, recipe: Recipe) -> bytes:
    """Standard input of the program: derive `recipe` in the store."""
    return json.dumps({"store": store.opening, "recipe": asdict(recipe)}).encode()


def result(output: bytes) -> str:
    """The digest that the program printed.

    Raises the StoreError that it printed instead, and ValueError where it printed neither.
    """
    answer = json.loads(output)
    if "refused" in answer:
        raise UnsupportedFeatureError(**answer["refused"])
    if "unavailable" in answer:
        raise StoreUnavailableError(**answer["unavailable"])
    return str(answer["digest"])


def run(job: bytes) -> dict[str, Any]:
    """Do a job; returns the answer that the program prints as JSON."""
    given = json.loads(job)
    parts = given["recipe"]
    components = tuple((digest, weight) for digest, weight in parts.pop("components"))
    try:
        recipe = Recipe(components=components, **parts)
        return {"digest": derive(Store(*given["store"]), recipe)}
    except StoreError as error:
        refusal = {"problem": error.problem, "file": error.file, "key": error.key}
        away = isinstance(error, StoreUnavailableError)
        return {"unavailable" if away else "refused": {**refusal, "remedy": error.remedy}}


def main() -> None:
    os.nice(NICENESS)
    import torch

    torch.set_num_threads(1)
    answer = run(sys.stdin.buffer.read())
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
