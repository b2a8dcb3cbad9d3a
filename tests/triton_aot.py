"""Compiling Triton kernels for GPUs that are not there.

A test file gives `CASES`, names of functions that call an op's launchers on tensors of the device "meta". A process of its own,
since kernels must not be decorated for the interpreter, runs them as if on a GPU of some compute capability, records the
launches instead of making them, and compiles each as Triton would have.

    python -m tests.triton_aot        then lines of JSON [test file, case, major, minor] on its standard input
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from tests.serving import Server, serve

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
"""For which every case is compiled."""

SHARED_MEMORY = {(8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
"""Bytes that one block may have, by compute capability."""

_MATRIX_INSTRUCTIONS = {8: "mma.sync", 9: "wgmma", 10: "tcgen05.mma"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    kernel: str
    settings: dict[str, Any]  # the compile-time arguments
    registers: int  # per thread
    stack: int  # bytes of local memory per thread, spilled registers included
    shared: int  # bytes per block
    matrix_instructions: int  # of the newest kind the chip has


class Compiler:
    """The cases of one test file, as a server compiles them."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server, self.path = server, path

    def __call__(self, case: str, capability: tuple[int, int]) -> list[Compiled]:
        found = self.server.ask([str(self.path), case, *capability])
        if isinstance(found, str):
            raise RuntimeError(found)
        return [Compiled(**item) for item in found]


def server(cache: str) -> Server:
    """What compiles, with a folder for compiled kernels: a launch that several cases share is compiled once."""
    return Server("tests.triton_aot", {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache})


def faults(compiled: Compiled, capability: tuple[int, int], matrix: bool) -> list[str]:
    """What a launch must not have: spills, more shared memory than the chip, a matrix kernel without its instructions."""
    found = []
    if compiled.stack > 0:
        found.append(f"{compiled.stack} bytes of local memory per thread")
    if compiled.shared > SHARED_MEMORY[capability]:
        found.append(f"{compiled.shared} bytes of shared memory, the chip has {SHARED_MEMORY[capability]}")
    if matrix and compiled.matrix_instructions == 0:
        found.append(f"no {_MATRIX_INSTRUCTIONS[capability[0]]} instruction")
    return found


def assert_sound(
    found: list[Compiled], capability: tuple[int, int], multiplies: Callable[[Compiled], bool]
) -> None:
    """No launch has a fault; `multiplies` says of which kernels matrix instructions are expected."""
    wrong = {
        f"{compiled.kernel} {compiled.settings}: {fault}"
        for compiled in found
        for fault in faults(compiled, capability, multiplies(compiled))
    }
    assert not wrong, "\n".join(sorted(wrong))


def _specialize(
    kernel: Any, arguments: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as a launch has them: 1 and None are constants, multiples of 16 are marked."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = parameter.is_constexpr or value is None
        integer = isinstance(value, int) and not isinstance(value, bool)
        if fixed or (integer and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = mangle_type(value)
        address = value.storage_offset() * value.element_size() if isinstance(value, torch.Tensor) else value
        if isinstance(address, int) and address % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _options(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in kernel.arg_names}


def _compile(kernel: Any, arguments: dict[str, Any], capability: tuple[int, int]) -> Compiled:
    signature, constants, attributes = _specialize(kernel, arguments)
    options = _options(kernel, arguments)
    binary = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    settings = {name: value for name, value in constants.items() if value is not None}
    return Compiled(
        kernel=kernel.__name__,
        settings={**settings, **options},
        registers=numbers["REG"],
        stack=numbers["STACK"] + numbers["LOCAL"],
        shared=max(numbers["SHARED"], binary.metadata.shared),
        matrix_instructions=binary.asm["ptx"].count(_MATRIX_INSTRUCTIONS[capability[0]]),
    )


@contextmanager
def _recording(capability: tuple[int, int]) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    launches: list[tuple[Any, dict[str, Any]]] = []

    def record(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append((kernel, {**dict(zip(kernel.arg_names, positional, strict=False)), **named}))

    before = JITFunction.run, torch.cuda.get_device_capability
    JITFunction.run = record
    torch.cuda.get_device_capability = lambda device=None: capability
    try:
        yield launches
    finally:
        JITFunction.run, torch.cuda.get_device_capability = before


def _run(case: Callable[[], None], capability: tuple[int, int]) -> list[Compiled]:
    with _recording(capability) as launches:
        case()
    compiled: dict[str, Compiled] = {}
    for kernel, arguments in launches:
        key = f"{kernel.__name__} {_specialize(kernel, arguments)} {_options(kernel, arguments)}"
        if key not in compiled:
            compiled[key] = _compile(kernel, arguments, capability)
    return list(compiled.values())


@functools.cache
def _cases(path: str) -> dict[str, Callable[[], None]]:
    name = f"aot_cases_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    cases: dict[str, Callable[[], None]] = module.CASES
    return cases


def _answer(question: list[Any]) -> list[dict[str, Any]] | str:
    """What was compiled, or the error."""
    path, case, *capability = question
    # What another case has set must not decide what this one compiles.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        return [dataclasses.asdict(item) for item in _run(_cases(path)[case], tuple(capability))]
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
        cause = error.__cause__
        while cause is not None:
            answer += f"\n{type(cause).__name__}: {cause}"
            cause = cause.__cause__
        return answer


def _overfull(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tile = tl.load(pointer + at)
    tl.store(pointer + at, tile / tl.sum(tile, 0)[None, :] + tl.sum(tile, 1)[:, None])


overfull_kernel = triton.jit(_overfull)
"""A kernel whose live values fit no register file, for the test that such are caught."""


if __name__ == "__main__":
    serve(_answer)
