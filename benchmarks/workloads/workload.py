"""What a benchmark of an op consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..measure import Step

Function = Callable[..., Any]


class Workload(NamedTuple):
    """An op's cases and the functions that compute it; each takes what `make_inputs` returns, as keywords.

    A function returns a tensor or a tuple of them. What is differentiated is the sum of all floating outputs, each element times
    a fixed weight, so that a gradient that would be right for equal weights alone does not pass.

    Args:
        cases: BENCHMARK_SHAPES, flops(shape, backward) and bytes_moved(shape, dtype, backward).
        make_inputs: (shape, dtype=, device=) -> arguments, leaves requiring gradients.
        ours: the op; takes `backend` too.
        peers: the same in PyTorch, by name; "eager" is compiled for "compile".
        backends: of `ours`, those to time where they serve the device.
        parity: the small shape on which every variant must agree with float64.
        products: the matrix products that no method can avoid, as a step on the arguments, forward and backward; timed beside.
        backward: whether there is one.
    """

    cases: Any
    make_inputs: Callable[..., dict[str, Any]]
    ours: Function
    peers: Mapping[str, Function]
    backends: tuple[str, ...]
    parity: Any
    products: Callable[[dict[str, Any], bool], Step] | None = None
    backward: bool = True
