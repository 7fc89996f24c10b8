"""paged_attention on the GPU: which kernels are launched over what, and all that are compiled.

Sequences are handled by how many queries they have, each kind by a launch with tiles of its own, so
that a sequence's sums run in the same order whatever else is in the batch:

    few queries      tiles of 16 rows; the keys cut in splits, for decode
    up to 64         tiles of 64 rows; splits as above, for verification and short chunks
    more             tiles of up to 128 rows over all keys, for prefill

One more launch merges the splits of the first two. The kernels are in paged_attention_device.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quickchange_kernels.attention.head_operands import aligned_elements, aligned_heads, is_aligned
from quickchange_kernels.attention.paged_attention_device import (
    merge_splits_kernel,
    paged_attention_kernel,
)
from quickchange_kernels.attention.paged_attention_plain import plain_paged_attention
from quickchange_kernels.attention.paged_attention_tuning import (
    AttentionLaunch,
    Splits,
    Tiling,
    kernel_constants,
    launches_for,
    merge_constants,
    programs_along,
    seen_keys,
    splits_for,
    tilings,
)
from quickchange_kernels.compilation import ONE_OF_EACH_COMPILER, TARGETS, Compilation
from quickchange_kernels.gpu_targets import TARGETS as TARGETS_BY_NAME
from quickchange_kernels.gpu_targets import Target, target_of

MERGE_WARPS = 4


def launch_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """paged_attention; see paged_attention_contract.py.

    Dtypes other than float32, bfloat16 and float16 go to the plain version. Raises TypeError or
    ValueError on what does not fit together.
    """
    _check(q, k_cache, v_cache, block_tables, seq_lens, query_start)
    for name, by_head in (("sinks", sinks), ("slopes", slopes)):
        _check_by_head(name, by_head, q.shape[1])
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return plain_paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            query_start,
            scale,
            window,
            softcap,
            sinks,
            slopes,
        )
    kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
    call = Call(
        aligned_heads(q),
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start,
        float(scale),
        max(window, 0),
        max(float(softcap), 0.0),
        sinks,
        slopes,
        splits_for(kv_heads),
    )
    out = torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)
    if out.numel() > 0 and len(seq_lens) > 0:
        group, target = q.shape[1] // kv_heads, target_of(q.device)
        call.run(
            launches_for(len(q), len(seq_lens), group, dim, v_cache.shape[3], q.itemsize, target),
            out,
        )
    return out


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
) -> None:
    for index in (block_tables, seq_lens, query_start):
        if index.dtype != torch.int32 or not index.is_contiguous():
            raise TypeError(
                "paged_attention: block_tables, seq_lens and query_start must be contiguous int32"
            )
    fits = (
        (q.dim(), k_cache.dim(), v_cache.dim(), block_tables.dim()) == (3, 4, 4, 2)
        and k_cache.shape[:3] == v_cache.shape[:3]
        and q.shape[2] == k_cache.shape[3]
        and q.shape[1] % k_cache.shape[1] == 0
        and query_start.numel() == seq_lens.numel() + 1 == block_tables.shape[0] + 1
    )
    if not fits:
        raise ValueError(
            f"paged_attention: q {list(q.shape)}, k_cache {list(k_cache.shape)}, v_cache "
            f"{list(v_cache.shape)}, block_tables {list(block_tables.shape)}, seq_lens "
            f"{list(seq_lens.shape)} and query_start {list(query_start.shape)} do not fit together"
        )
    if not (k_cache.dtype == v_cache.dtype == q.dtype):
        raise TypeError(
            f"paged_attention: q is {q.dtype}, but the caches {k_cache.dtype} and {v_cache.dtype}; "
            "they must be equal"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not (cache.is_contiguous() and is_aligned(cache)):
            raise ValueError(
                f"paged_attention: {name} must be contiguous and begin at a multiple of 16 bytes"
            )


def _check_by_head(name: str, values: Tensor | None, heads: int) -> None:
    if values is None:
        return
    if values.dtype != torch.float32 or not values.is_contiguous():
        raise TypeError(f"paged_attention: {name} must be contiguous float32")
    if values.shape != (heads,):
        raise ValueError(
            f"paged_attention: {name} {list(values.shape)} must be one for each of {heads} query "
            "heads"
        )


@dataclass(frozen=True)
class Call:
    """The operands of one call, as the kernels take them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    slopes: Tensor | None
    splits: Splits

    def run(self, launches: list[AttentionLaunch], out: Tensor) -> None:
        """Write the output of the launches' sequences, and of no others."""
        split = [launch for launch in launches if launch.split]
        if split:
            self._attend_split(split, out)
        for launch in launches:
            if not launch.split:
                self._attend(launch, out, None, 1)

    def _attend_split(self, launches: list[AttentionLaunch], out: Tensor) -> None:
        T, heads, value_dim = out.shape
        capacity = self.block_tables.shape[1] * self.k_cache.shape[2]
        reached = self.splits.reached(seen_keys(capacity, self.window))
        partials = self.splits.partials(T, len(self.seq_lens), reached)
        parts, stats = (
            torch.empty((partials, heads, width), dtype=torch.float32, device=out.device)
            for width in (value_dim, 2)
        )
        for launch in launches:
            self._attend(launch, parts, stats, reached)
        merge_splits_kernel[(T, programs_along(T, heads))](
            parts,
            stats,
            self.seq_lens,
            self.query_start,
            self.sinks,
            out,
            heads,
            len(self.seq_lens),
            launches[0].least,
            launches[-1].most,
            self.splits.keys,
            reached,
            self.splits.room,
            self.window,
            **merge_constants(value_dim, self.window > 0),
            num_warps=MERGE_WARPS,
            num_stages=1,
        )

    def _attend(
        self, launch: AttentionLaunch, out: Tensor, stats: Tensor | None, reached: int
    ) -> None:
        T, heads, dim = self.q.shape
        kv_heads, page = self.k_cache.shape[1:3]
        tiling = launch.tiling
        tiles = T // (tiling.rows // (heads // kv_heads)) + len(self.seq_lens)
        align = aligned_elements(dim, self.q.itemsize)
        paged_attention_kernel[(tiles, kv_heads, programs_along(tiles * kv_heads, reached))](
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.seq_lens,
            self.query_start,
            self.sinks if stats is None else None,
            self.slopes,
            out,
            stats,
            len(self.seq_lens),
            launch.least,
            launch.most,
            self.splits.keys,
            reached,
            self.splits.room,
            self.window,
            self.scale,
            self.softcap,
            self.q.stride(0) // align,
            self.q.stride(1) // align,
            self.block_tables.stride(0),
            **kernel_constants(
                heads,
                kv_heads,
                dim,
                self.v_cache.shape[3],
                page,
                self.q.itemsize,
                tiling,
                WINDOW=self.window > 0,
                SOFTCAP=self.softcap > 0,
                SPLIT=launch.split,
            ),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            **tiling.options,
        )


_ATTEND_POINTERS = {
    "block_tables": "*i32",
    "seq_lens": "*i32",
    "query_start": "*i32",
    "sinks": "*fp32",
    "slopes": "*fp32",
    "stats": "*fp32",
}
_ATTEND_SCALARS = (
    dict.fromkeys(("sequences", "least", "most", "split_keys", "most_splits", "room"), "i32")
    | dict.fromkeys(("window", "q_row", "q_head", "table_row"), "i32")
    | dict.fromkeys(("scale", "softcap"), "fp32")
)
_MERGE_SIGNATURE = (
    {"parts": "*fp32", "stats": "*fp32", "seq_lens": "*i32", "query_start": "*i32"}
    | {"sinks": "*fp32"}
    | dict.fromkeys(("heads", "sequences", "least", "most", "split_keys"), "i32")
    | dict.fromkeys(("most_splits", "room", "window"), "i32")
)


@dataclass(frozen=True)
class AttentionShape:
    """What a model's attention is compiled for. windows: whether some layers have one, or none."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    page: int = 16
    softcap: bool = False
    sinks: bool = False
    slopes: bool = False
    windows: tuple[bool, ...] = (False,)

    def compilations(self, model: str, dtype: str, target: Target) -> Iterator[Compilation]:
        """Each kernel that a launch for this shape can need on a target, once: no batch needs more.

        dtype: as Triton names it. For a warm-up, and for a cache that is compiled ahead.
        """
        kinds = ("decode", "verify", "prefill")
        sizes = tilings(
            self.heads // self.kv_heads, self.dim, self.value_dim, _ITEMSIZE[dtype], target
        )
        for window in self.windows:
            suffix = f"{model}{', window' if window else ''}, {dtype}"
            names: dict[tuple[str, bool], str] = {}
            for kind, tiling in zip(kinds, sizes, strict=True):
                names.setdefault((repr(tiling), kind != "prefill"), kind)
            for kind, tiling in zip(kinds, sizes, strict=True):
                if kind in names.values():
                    name = f"attention {kind}, {suffix}"
                    yield self._attend(name, dtype, tiling, window, kind != "prefill")
            yield self._merge(f"attention merge, {suffix}", dtype, window)

    def _attend(
        self, name: str, dtype: str, tiling: Tiling, window: bool, split: bool
    ) -> Compilation:
        pointers = dict.fromkeys(("q", "k_cache", "v_cache"), f"*{dtype}") | _ATTEND_POINTERS
        pointers["out"] = "*fp32" if split else f"*{dtype}"
        present = {"sinks": self.sinks and not split, "slopes": self.slopes, "stats": split}
        absent = [pointer for pointer, given in present.items() if not given]
        return Compilation(
            name=name,
            kernel=paged_attention_kernel,
            signature={k: v for k, v in pointers.items() if k not in absent} | _ATTEND_SCALARS,
            constants=kernel_constants(
                self.heads,
                self.kv_heads,
                self.dim,
                self.value_dim,
                self.page,
                _ITEMSIZE[dtype],
                tiling,
                WINDOW=window,
                SOFTCAP=self.softcap,
                SPLIT=split,
            )
            | dict.fromkeys(absent),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            products=dtype != "fp32",
            options=tiling.options,
        )

    def _merge(self, name: str, dtype: str, window: bool) -> Compilation:
        signature = _MERGE_SIGNATURE | {"out": f"*{dtype}"}
        absent = [] if self.sinks else ["sinks"]
        return Compilation(
            name=name,
            kernel=merge_splits_kernel,
            signature={k: v for k, v in signature.items() if k not in absent},
            constants=merge_constants(self.value_dim, window) | dict.fromkeys(absent),
            num_warps=MERGE_WARPS,
            num_stages=1,
        )


_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
_MODELS = {
    "Llama 8B": AttentionShape(32, 8, 128, 128, windows=(False, True)),  # window: Mistral 7B
    "SmolLM2": AttentionShape(9, 3, 64, 64),
    "Gemma 2 9B": AttentionShape(16, 8, 256, 256, softcap=True, windows=(False, True)),
    "gpt-oss 20B": AttentionShape(64, 8, 64, 64, sinks=True, windows=(True,)),
    "DeepSeek V3": AttentionShape(128, 128, 192, 128),
    "DeepSeek V3, latent": AttentionShape(16, 1, 576, 512),
    "Gemma 4 31B": AttentionShape(32, 4, 512, 512),
    "MPT 7B": AttentionShape(32, 32, 128, 128, slopes=True),
}
_IN_FLOAT32 = ("Llama 8B", "SmolLM2", "Gemma 2 9B", "DeepSeek V3, latent")  # of every width


def compilations() -> Iterator[Compilation]:
    """Configurations for decode, verification (up to 64 tokens), prefill and merging."""
    wanted = [
        *((model, shape, "bf16", TARGETS) for model, shape in _MODELS.items()),
        *((m, replace(_MODELS[m], windows=(False,)), "fp32", TARGETS) for m in _IN_FLOAT32),
        ("Llama 8B", _MODELS["Llama 8B"], "fp16", ONE_OF_EACH_COMPILER),
    ]
    yield from _alike_once(
        (target, one)
        for model, shape, dtype, targets in wanted
        for target in targets
        for one in shape.compilations(model, dtype, TARGETS_BY_NAME[target])
    )


def _alike_once(found: Iterable[tuple[str, Compilation]]) -> Iterator[Compilation]:
    """Each configuration once, for all targets on which it ships, under the first one's name."""
    alike: dict[str, tuple[Compilation, dict[str, None]]] = {}
    for target, one in found:
        same = repr((one.kernel, dict(one.signature), dict(one.constants), one.num_warps))
        key = f"{same} {one.num_stages} {dict(one.options)}"
        alike.setdefault(key, (one, {}))[1][target] = None
    taken: Counter[str] = Counter()
    for one, where in alike.values():
        taken[one.name] += 1
        name = one.name if taken[one.name] == 1 else f"{one.name}, on {next(iter(where))}"
        yield replace(one, name=name, targets=tuple(where))
