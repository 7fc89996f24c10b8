"""The GPU and the models that the tables are about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuRates:
    """A GPU's rates, as its maker states them, and two assumptions."""

    name: str
    bandwidth: float  # bytes/s of device memory
    tensor_rate: float  # operations/s, 16-bit products with float32 sums, dense
    processors: int
    issue_rate: float  # warp instructions/s of one processor: 4 a cycle
    launch: float  # s between kernels of a CUDA graph: an assumption
    latency: float  # s of a load from device memory under load: an assumption

    def floor(self, bytes_moved: float, operations: float) -> float:
        """The least time in which both can be done, in seconds."""
        return max(bytes_moved / self.bandwidth, operations / self.tensor_rate)

    @property
    def bytes_in_flight(self) -> float:
        """Bytes that must be on their way at any time to use the whole bandwidth (Little's law)."""
        return self.bandwidth * self.latency


# NVIDIA H100 SXM data sheet; the clock is the one that its tensor rate implies, 1.83 GHz.
H100 = GpuRates(
    name="H100 SXM",
    bandwidth=3.35e12,
    tensor_rate=989e12,
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


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder-only model in 16 bits."""

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


LLAMA_8B = Model("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = Model("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256)
MODELS = (LLAMA_8B, LLAMA_70B)
