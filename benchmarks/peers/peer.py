"""What a peer is: a published implementation of an op, called with the op's own arguments."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch

from ..workloads.workload import Function

INSTALLED_OTHERWISE = {"torch": "pip install torch", "transformers": "pip install 'jrl[train]'"}


class Peer(NamedTuple):
    """One published implementation.

    Args:
        library: the distribution whose version goes into the row.
        load: imports it, and returns a function of the keywords of the op's `make_inputs`. Raises where the library cannot be
            used; the function it returns raises NotImplementedError for a shape that the library refuses.
        devices: where its kernels run.
        capability: the one compute capability that it is written for; None: any.
        dtypes: of the inputs; None: any floating one.
        passes: those that it has.
        why: how it differs from our op, one line.
    """

    library: str
    load: Callable[[], Function]
    devices: tuple[str, ...] = ("cpu", "cuda")
    capability: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    passes: tuple[str, ...] = ("forward", "forward+backward")
    why: str = ""


def installed(peer: Peer) -> tuple[Function | None, str]:
    """The peer's function and its library's version, or None and the reason why there is none."""
    try:
        version = metadata.version(peer.library)
    except metadata.PackageNotFoundError:
        how = INSTALLED_OTHERWISE.get(peer.library, "make peers")
        return None, f"{peer.library} is not installed: {how}"
    try:
        return peer.load(), version
    except Exception as error:  # whatever a foreign import may raise is an answer, not a failure of the run
        line = next(iter(str(error).splitlines()), "")
        return None, f"{peer.library} {version} cannot be used: {type(error).__name__}: {line}"
