"""Tests of the drop-ins against the libraries they serve, which `make hosts` puts into build/hosts/site-packages.

    make test                                                              # installs them and runs everything
    PYTHONPATH=build/hosts/site-packages .venv/bin/python -m pytest tests/hosts

They lie apart because transformers and torchmetrics import torchvision where they find it, and PyPI's does not load beside every
torch: `sitecustomize.py` there sees to that.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No progress bars and no network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
