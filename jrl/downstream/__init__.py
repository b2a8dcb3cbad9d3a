"""Downstream tasks on a trained image encoder: small heads, frozen or fine-tuned, on generated scenes."""

from __future__ import annotations

from jrl.downstream.captioning import Captioning
from jrl.downstream.classification import Classification
from jrl.downstream.detection import Detection
from jrl.downstream.features import Features, token_map
from jrl.downstream.fit import FrozenFeatures, Result, fit_head
from jrl.downstream.probe import TASKS, Outcome, probe
from jrl.downstream.scenes import ScenePart, scene_parts
from jrl.downstream.segmentation import Segmentation
from jrl.downstream.task import Recipe, Task
from jrl.downstream.vqa import VisualQuestions

__all__ = [
    "TASKS",
    "Captioning",
    "Classification",
    "Detection",
    "Features",
    "FrozenFeatures",
    "Outcome",
    "Recipe",
    "Result",
    "ScenePart",
    "Segmentation",
    "Task",
    "VisualQuestions",
    "fit_head",
    "probe",
    "scene_parts",
    "token_map",
]
