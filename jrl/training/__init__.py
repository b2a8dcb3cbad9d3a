"""Training: every system through Lightning."""

from __future__ import annotations

from jrl.training.checkpoint import AtomicCheckpointIO, ExportSystem, checkpoint_callbacks
from jrl.training.data import CaptionDataModule
from jrl.training.drawing import DrawSamples
from jrl.training.module import SystemModule
from jrl.training.run import Run
from jrl.training.watch import TrainingWatch

__all__ = [
    "AtomicCheckpointIO",
    "CaptionDataModule",
    "DrawSamples",
    "ExportSystem",
    "Run",
    "SystemModule",
    "TrainingWatch",
    "checkpoint_callbacks",
]
