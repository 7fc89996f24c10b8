"""Machines by what they move and compute in a second, and the models that the tables are about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPERANDS = ("float32", "bfloat16", "int8")  # that a CPU's products are measured for


@dataclass(frozen=True)
class MachineRates:
    """Rates that bound whatever runs on a machine."""

    name: str
    bandwidth: float  # bytes/s of the memory that holds weights, adapters, keys and values
    # operations/s by type of the operands, dense, wider sums; a multiply-add is two
    operations: Mapping[str, float]

    def floor(self, bytes_moved: float, operations: float, operands: str = "bfloat16") -> float:
        """The least time in which both can be done, in seconds."""
        return max(bytes_moved / self.bandwidth, operations / self.operations[operands])


@dataclass(frozen=True)
class GpuRates(MachineRates):
    """A GPU's rates, as its maker states them, and two assumptions."""

    processors: int
    issue_rate: float  # warp instructions/s of one processor: 4 a cycle
    launch: float  # s between kernels of a CUDA graph: an assumption
    latency: float  # s of a load from device memory under load: an assumption

    @property
    def bytes_in_flight(self) -> float:
        """Bytes that must be on their way at any time to use the whole bandwidth (Little's law)."""
        return self.bandwidth * self.latency


@dataclass(frozen=True)
class CoreAllowance:
    """Cores that this process may use."""

    affinity: int
    quota: float | None  # cores' worth of time of its control group; None: no limit

    @property
    def usable(self) -> int:
        """Threads that can run at once without being held up."""
        limit = self.affinity if self.quota is None else min(self.affinity, math.ceil(self.quota))
        return max(limit, 1)


@dataclass(frozen=True)
class CpuRates(MachineRates):
    """A CPU's rates on all usable cores together."""

    instruction_set: str
    allowance: CoreAllowance
    threads: int
    share: float  # s to begin an operation on all threads and to wait for all, one after another
    wake: float  # the same after a pause

    def native(self, operands: str) -> bool:
        """True if the CPU multiplies these operands as they are, not as float32."""
        return self.operations[operands] != self.operations["float32"] or operands == "float32"


# NVIDIA H100 SXM data sheet; the clock is the one that its tensor rate implies, 1.83 GHz.
H100 = GpuRates(
    name="H100 SXM",
    bandwidth=3.35e12,
    operations={"bfloat16": 989e12},
    processors=132,
    issue_rate=4 * 1.83e9,
    launch=2.5e-6,
    latency=0.7e-6,
)


@dataclass(frozen=True)
class Linear:
    """Linears that read one input, fused into one low-rank call."""

    name: str
    inputs: int
    outputs: tuple[int, ...]  # output features of each


_NEEDED = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True)
class Model:
    """The sizes of a dense decoder-only model."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linears of one layer, by their input."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return (
            Linear("q/k/v", self.hidden, (queries, keys, keys)),
            Linear("o", queries, (self.hidden,)),
            Linear("gate/up", self.hidden, (self.intermediate, self.intermediate)),
            Linear("down", self.intermediate, (self.hidden,)),
        )

    @property
    def head(self) -> Linear:
        """The LM head."""
        return Linear("head", self.hidden, (self.vocabulary,))

    @classmethod
    def of_config(cls, name: str, config: Mapping[str, Any]) -> Model:
        """The sizes in a config.json of a dense decoder with gated linears, such as a Llama's.

        Raises:
            ValueError: it lacks a size, or has experts.
        """
        if experts := [key for key in config if "experts" in key and config[key]]:
            raise ValueError(f"{name} has experts ({experts[0]}): only dense models are reckoned")
        for key in _NEEDED:
            if not config.get(key):
                raise ValueError(f"the config of {name} has no {key}")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            name=name,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
        )


LLAMA_8B = Model("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = Model("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256)
MODELS = (LLAMA_8B, LLAMA_70B)
