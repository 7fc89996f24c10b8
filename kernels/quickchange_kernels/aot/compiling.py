"""Finds the configurations that ship, and compiles one of them for one target."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import quickchange_kernels
from quickchange_kernels import dispatch
from quickchange_kernels.compilation import Compilation
from quickchange_kernels.gpu_targets import TARGETS, Target


def kernel_modules() -> list[str]:
    """Modules of Triton kernels in the package and its folders: those named `*_triton`."""
    package = quickchange_kernels
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [module.name for module in found if module.name.endswith("_triton")]


def compilations_of(module: str) -> Iterator[Compilation]:
    """Configurations of a module. Raises ValueError for none, RuntimeError if interpreted."""
    if dispatch.triton_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it to compile kernels")
    imported = importlib.import_module(module)
    if not hasattr(imported, "compilations"):
        raise ValueError(f"{module} has no compilations(): add it, so that its kernels are checked")
    yield from imported.compilations()


@dataclass(frozen=True)
class CompiledKernel:
    """What the compilers made of one configuration for one target."""

    asm: Mapping[str, Any]  # by stage: "ttir", "ptx" and "cubin", or "amdgcn"
    shared: int  # bytes of shared memory
    num_warps: int


def compiled(one: Compilation, target: Target) -> CompiledKernel:
    """Code of a configuration. Raises what Triton's compiler raises.

    A launch of what the configuration says finds the result in Triton's cache. Where a target takes
    another's code (`code_of`), its own assembler assembles that.
    """
    import triton
    from triton.compiler.compiler import make_backend

    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, **one.options}
    base = target if target.code_of not in one.targets else TARGETS[str(target.code_of)]
    kernel = triton.compile(source(one), target=base.triton_target(), options=options)
    asm = dict(kernel.asm)
    if base != target:
        backend = make_backend(target.triton_target())
        parsed = backend.parse_options(options)
        asm["cubin"] = backend.make_cubin(asm["ptx"], {}, parsed, target.arch)
    return CompiledKernel(asm, kernel.metadata.shared, kernel.metadata.num_warps)


def source(one: Compilation) -> Any:
    """The triton.compiler.ASTSource that a launch of this configuration makes."""
    from triton.compiler import ASTSource

    names = list(one.kernel.arg_names)
    _check_arguments(one, names)
    types = {name: one.signature.get(name, "constexpr") for name in names}
    hints = {param.name: _hint(one, param, types[param.name]) for param in one.kernel.params}
    return ASTSource(
        fn=one.kernel,
        signature=types,
        constexprs={name: one.constants[name] for name in names if name in one.constants},
        attrs={(at,): hints[name] for at, name in enumerate(names) if hints[name] is not None},
    )


def _hint(one: Compilation, param: Any, kind: str) -> list[list[Any]] | None:
    """What a launch tells the compiler of an argument's value; None where Triton passes no word."""
    if kind == "constexpr":
        return []
    if kind.startswith("fp") or param.do_not_specialize:
        return None
    aligned = kind.startswith("*") or param.name in one.divisible_by_16
    return [["tt.divisibility", 16]] if aligned and not param.do_not_specialize_on_alignment else []


def _check_arguments(one: Compilation, names: list[str]) -> None:
    given = {*one.signature, *one.constants}
    if set(one.signature) & set(one.constants) or given != set(names):
        raise ValueError(
            f"{one.name}: signature and constants must name each argument of the kernel once; "
            f"wrong: {', '.join(sorted(given ^ set(names)) or sorted(one.constants))}"
        )
    unknown = [
        param.name
        for param in one.kernel.params
        if param.name in one.divisible_by_16
        and (param.do_not_specialize or param.do_not_specialize_on_alignment)
    ]
    if unknown:
        raise ValueError(
            f"{one.name}: divisible_by_16 names {', '.join(unknown)}, on which the kernel is not "
            "specialised: no launch says so"
        )
