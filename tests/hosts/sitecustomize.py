"""Lets PyPI's torchvision be imported beside a torch that it was not built for. `make hosts` copies this beside the libraries.

PyPI's torchvision is built for a CUDA torch: beside a CPU torch its operators do not load, and importing it fails at the first
of them. Nothing that the tests and examples do needs an operator of it, so their schemas are registered in its place, when Python
starts and before anything imports it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util


def _registered() -> object:
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("torch") is None:
        return None
    import torch

    if torch.version.cuda is not None or "+cpu" in importlib.metadata.version("torchvision"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


# the schemas live as long as this
SCHEMAS = _registered()
