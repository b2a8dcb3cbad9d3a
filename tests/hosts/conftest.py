"""Tests of the drop-ins against the libraries they serve, which `make hosts` puts into build/hosts/site-packages.

    make test                                                              # installs them and runs everything
    PYTHONPATH=build/hosts/site-packages .venv/bin/python -m pytest tests/hosts

They lie apart because transformers and torchmetrics import torchvision where they find it, and PyPI's torchvision is built for a
CUDA torch: beside a CPU torch its operators do not load, and importing it fails at the first of them. No test here needs an
operator of it, so their schemas are registered in its place, before anything imports it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator

import pytest
import torch

OPERATORS: list[torch.library.Library] = []


def _register_torchvision_operators() -> None:
    if importlib.util.find_spec("torchvision") is None or torch.version.cuda is not None:
        return
    if "+cpu" in importlib.metadata.version("torchvision"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    OPERATORS.append(library)


_register_torchvision_operators()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No progress bars and no network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
