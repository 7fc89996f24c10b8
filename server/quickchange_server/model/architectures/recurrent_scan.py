"""Mamba-1's scan over several rows, beginning with a state.

transformers' `mamba_selective_scan` always begins with none, so that its layers forget what came
before a chunk. The recurrence is linear in its state: what a state adds to every row's output, and
to the state at the end, is it decayed as far as there. A layer is given a scan that adds this; the
rest of its code, and the scan itself, stay transformers'.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_NAME = "mamba_selective_scan"


class ScanFromState:
    """A selective scan, one call of which begins with each of the states that `begin` gave."""

    def __init__(self, scan: Callable[..., Any]) -> None:
        self._scan = scan
        self._states: list[torch.Tensor] = []

    def begin(self, states: torch.Tensor | None) -> None:
        """states [B, I, N], or [B, heads, I, N] for a scan of each head; None: no state."""
        if states is None:
            self._states = []
        else:
            self._states = [states] if states.dim() == 3 else list(states.unbind(1))

    def __call__(
        self,
        hidden_states: torch.Tensor,  # [B, I, T]
        dt: torch.Tensor,  # [B, I, T]
        A: torch.Tensor,  # [I, N]
        B: torch.Tensor,  # [B, N, T]
        C: torch.Tensor,  # [B, N, T]
        *,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        **options: Any,
    ) -> Any:
        """The scan's outputs [B, I, T], and the state after the last row where that is asked."""
        options |= {"delta_bias": delta_bias, "delta_softplus": delta_softplus}
        if not self._states:
            return self._scan(hidden_states, dt, A, B, C, z=z, **options)
        state = self._states.pop(0)
        out, last = self._scan(hidden_states, dt, A, B, C, z=None, **options)
        steps = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        steps = functional.softplus(steps) if delta_softplus else steps
        decay = torch.exp(A[:, :, None] * steps.float().cumsum(-1)[:, :, None])  # [B, I, N, T]
        decayed = decay * state.float()[..., None]
        out = out + torch.einsum("bint,bnt->bit", decayed, C.float()).to(out.dtype)
        if z is not None:
            out = out * functional.silu(z)
        return out, last + decayed[..., -1].to(last.dtype)


def scan_from_state(module: nn.Module) -> tuple[ScanFromState, Callable[..., Any]] | None:
    """A scan for `module` and its `forward` with that scan; None if it uses no such scan."""
    plain = inspect.unwrap(type(module).forward)
    if not isinstance(plain, FunctionType) or _NAME not in plain.__code__.co_names:
        return None
    scan = ScanFromState(plain.__globals__[_NAME])
    own = FunctionType(
        plain.__code__,
        {**plain.__globals__, _NAME: scan},
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    own.__kwdefaults__ = plain.__kwdefaults__
    return scan, MethodType(own, module)
