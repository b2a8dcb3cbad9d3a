"""Evaluation of text-to-image generation: distances, scores, R-precision, found objects, human rankings."""

from __future__ import annotations

from jrl.generation.classifier import CLASSES, SceneClassifier
from jrl.generation.detector import ClassifierDetector, Detector, HeadDetector
from jrl.generation.evaluate import (
    Judges,
    Pair,
    Scores,
    Seen,
    evaluate_generation,
    generate_pictures,
    judge,
    look,
    real_pictures,
)
from jrl.generation.features import FeatureNetwork, load_network
from jrl.generation.independence import check_independent, shared_parameters
from jrl.generation.pairs import run_pairs
from jrl.generation.recipe import Recognition, train_scene_classifier

__all__ = [
    "CLASSES",
    "ClassifierDetector",
    "Detector",
    "FeatureNetwork",
    "HeadDetector",
    "Judges",
    "Pair",
    "Recognition",
    "SceneClassifier",
    "Scores",
    "Seen",
    "check_independent",
    "evaluate_generation",
    "generate_pictures",
    "judge",
    "load_network",
    "look",
    "real_pictures",
    "run_pairs",
    "shared_parameters",
    "train_scene_classifier",
]
