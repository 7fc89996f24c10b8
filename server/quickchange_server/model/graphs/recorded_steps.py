"""The CPU's graphs: forward passes recorded by the native library and run again in one call.

What PyTorch's dispatcher was asked to compute is recorded with the memory that it was given
(`step_plan.h` of the kernels), so that Python and PyTorch's allocator are passed by, and the bits
are those of the pass that was recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from quickchange_kernels import dispatch, native
from quickchange_server.model.graphs.cuda_graphs import Capture, CudaCapture, Outputs, computed_once

logger = logging.getLogger(__name__)


class NativeCapture:
    """A `Capture` whose passes share one pool of memory: only one of them runs at a time.

    A pass that reads values on the host can't be run again without Python; it is then computed anew
    each time, which is said once.
    """

    def __init__(self) -> None:
        self._memory = torch.classes.quickchange_native.StepMemory()
        self._refused = False

    @property
    def bytes(self) -> int:
        """The most bytes that the passes have taken at once."""
        taken: int = self._memory.bytes()
        return taken

    def __call__(self, compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        if self._refused:
            return _computed_anew(compute)
        plan = torch.classes.quickchange_native.StepPlan(self._memory)
        plan.begin()
        try:
            outputs = compute()
        finally:
            refusal = plan.end()
        if not refusal and (held := plan.held(list(outputs))):
            refusal = f"{held} tensors of a pass are kept beyond it"
        if refusal:
            self._refused = True
            logger.info("steps are computed without a recorded plan: %s", refusal)
            return _computed_anew(compute)
        return plan.run, outputs


def _computed_anew(compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    outputs = tuple(output.clone() for output in compute())

    @torch.inference_mode()
    def replay() -> None:
        for output, again in zip(outputs, compute(), strict=True):
            output.copy_(again)

    return replay, outputs


def capture_for(device: torch.device) -> Capture | None:
    """The capture that suits a device; None if every step runs eagerly."""
    if device.type == "cuda":
        return CudaCapture(device)
    if dispatch.triton_compiles(device):
        return computed_once
    return NativeCapture() if native.ensure() else None
