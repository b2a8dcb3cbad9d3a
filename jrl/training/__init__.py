"""Training: every system through Lightning."""

from __future__ import annotations

from jrl.training.checkpoint import AtomicCheckpointIO, ExportSystem, checkpoint_callbacks
from jrl.training.data import CaptionDataModule
from jrl.training.module import SystemModule
from jrl.training.run import Run

__all__ = [
    "AtomicCheckpointIO",
    "CaptionDataModule",
    "ExportSystem",
    "Run",
    "SystemModule",
    "checkpoint_callbacks",
]
