"""Runs on disk, judged by the same judges on the same texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from jrl.evaluation.generation import inception_score
from jrl.generation.classifier import SceneClassifier
from jrl.generation.detector import ClassifierDetector
from jrl.generation.evaluate import (
    Judges,
    Pair,
    Scores,
    Seen,
    check_judges,
    evaluate_generation,
    judge,
    judges_of,
    look,
    picture_size,
    real_pictures,
)
from jrl.generation.features import load_network
from jrl.generation.pairs import run_pairs
from jrl.systems.base import CONFIG, PICKLED, WEIGHTS
from jrl.training.data import PREPROCESSING
from jrl.training.run import Run

# an inception score of real pictures below this is of a network that tells them hardly apart
_BLIND = 1.05


@dataclass(frozen=True)
class Settings:
    """How runs are judged.

    Attributes:
        features: folder of a `SceneClassifier`, which finds objects too, or a file of another network; None for neither.
        encoder: folder of the run for R-precision; None for none.
        part: of the runs' data.
        samples: texts.
        candidates: of R-precision.
        splits: of the inception score.
        seed: of texts, noise, mismatched texts and splits.
        batch_size: pictures generated together.
        device: where everything goes.
        allow_pickle: take pickled weights, and files of exported programs.
    """

    features: str | None = None
    encoder: str | None = None
    part: str = "test"
    samples: int = 1000
    candidates: int = 100
    splits: int = 1
    seed: int = 0
    batch_size: int = 64
    device: str = "cpu"
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.features is None and self.encoder is None:
            raise ValueError("features, encoder: expected at least one of them")
        ranges = (("batch_size", 1), ("samples", 2), ("candidates", 2), ("splits", 1), ("seed", 0))
        for name, least in ranges:
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.splits > self.samples:
            raise ValueError(f"splits: expected at most the {self.samples} samples, got {self.splits}")
        if self.samples < self.candidates and self.encoder is not None:
            raise ValueError(
                f"samples: expected at least the {self.candidates} candidates of R-precision, got {self.samples}"
            )

    def protocol(self) -> dict[str, Any]:
        """What the numbers depend on, in JSON types: the judges by what they compute with, wherever they lie."""
        return {
            "features": None if self.features is None else digest(self.features),
            "encoder": None if self.encoder is None else digest(self.encoder),
            **{name: getattr(self, name) for name in ("part", "samples", "candidates", "splits", "seed")},
        }


class Session:
    """Judges in memory, the texts, and what the judges saw of the real pictures.

    Args:
        first: folder of a run, whose data the texts are of; every other one has to have the same.
        settings: how to judge.
        say: is told what happens.

    Raises:
        FileNotFoundError: there is no such run, folder or file.
        TypeError: the run's system is no `XMCGAN`.
        ValueError: the part holds too few pictures or different texts, what is loaded is unreadable, or a judge shares
            weights with the run.
    """

    def __init__(
        self, first: str | Path, settings: Settings, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.settings, self.say = settings, say
        run = self._load(first)
        self.size = picture_size(run)
        self._check_folder(first)
        network: nn.Module | None = None
        encoder: Run | None = None
        if settings.features is not None:
            network = load_network(settings.features, allow_pickle=settings.allow_pickle).to(settings.device)
        if settings.encoder is not None:
            encoder = Run.load(settings.encoder, device=settings.device, allow_pickle=settings.allow_pickle)
        detector = ClassifierDetector(network).eval() if isinstance(network, SceneClassifier) else None
        self.judges = Judges(network, encoder, detector)
        # before anything slow begins
        check_judges(run, self.judges)
        self.pairs, self.others = self._pairs(first)
        if self.distinct["pictures"] < len(self.pairs):
            say(
                f"{settings.part} holds {self.distinct['pictures']} pictures: they come again for {len(self.pairs)} samples of "
                f"{self.distinct['texts']} different texts, with other noise"
            )
        texts, given = [pair.text for pair in self.pairs], self.judges
        self.judges = judges_of(texts, given, candidates=settings.candidates, splits=settings.splits)
        if self.judges.detector is not given.detector:
            say("no text names an object that the detector knows: its accuracy is left out")
        say(f"looking at {len(self.pairs)} real pictures")
        self.reference = self._look(self.pairs, self.judges)
        if self.reference.logits is not None:
            told_apart, _ = inception_score(self.reference.logits, splits=1)
            if told_apart < _BLIND:
                say(
                    f"features: this network says nearly the same of all real pictures (inception score {told_apart:.2f}), so "
                    "that its scores of generated ones mean nothing; train it longer"
                )

    def score(self, folder: str | Path) -> Scores:
        """Judge one run.

        Raises:
            FileNotFoundError: there is no such run.
            TypeError: its system is no `XMCGAN`.
            ValueError: it is the encoder's run or shares weights with a judge, or has other texts or another picture size.
        """
        self._check_folder(folder)
        run = self._load(folder)
        if picture_size(run) != self.size:
            raise ValueError(
                f"{folder}: generates {picture_size(run)} pixels a side, the first run {self.size}"
            )
        if _names(self._pairs(folder)[0]) != _names(self.pairs):
            raise ValueError(f"{folder}: its data are others than the first run's, so that the texts differ")
        self.say(f"judging {folder}")
        return evaluate_generation(
            run,
            self.pairs,
            self.judges,
            reference=self.reference,
            candidates=self.settings.candidates,
            splits=self.settings.splits,
            seed=self.settings.seed,
            batch_size=self.settings.batch_size,
        )

    def real(self) -> Scores:
        """The real pictures of the texts, as if they were generated; their distance is to as many other real ones."""
        enough = len(self.others) == len(self.pairs)
        other = self._look(self.others, Judges(network=self.judges.network)) if enough else None
        return judge(
            self.reference,
            other,
            [pair.text for pair in self.pairs],
            self.judges,
            candidates=self.settings.candidates,
            splits=self.settings.splits,
            seed=self.settings.seed,
        )

    @property
    def distinct(self) -> dict[str, int]:
        """How many different pictures and texts the samples are of."""
        return {
            "pictures": len({pair.name for pair in self.pairs}),
            "texts": len({pair.text for pair in self.pairs}),
        }

    @property
    def texts(self) -> str:
        """A digest of the texts and of the names of their pictures."""
        return hashlib.sha256(json.dumps(_names(self.pairs)).encode()).hexdigest()

    def _look(self, pairs: list[Pair], judges: Judges) -> Seen:
        pictures = real_pictures(pairs, self.size, self.settings.batch_size)
        return look(pictures, judges, self.settings.device)

    def _check_folder(self, folder: str | Path) -> None:
        encoder = self.settings.encoder
        if encoder is not None and Path(encoder).resolve() == Path(folder).resolve():
            raise ValueError(f"encoder: expected another run than the one that is judged, {folder}")

    def _load(self, folder: str | Path) -> Run:
        return Run.load(folder, device=self.settings.device, allow_pickle=self.settings.allow_pickle)

    def _pairs(self, folder: str | Path) -> tuple[list[Pair], list[Pair]]:
        settings = self.settings
        return run_pairs(folder, settings.samples, part=settings.part, seed=settings.seed)


def digest(path: str | Path) -> str:
    """SHA-256 of what a run, a network's folder or a file computes with: weights, configuration, preprocessing and tokenizer.

    Raises:
        FileNotFoundError: there are no weights.
    """
    path = Path(path)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    folder = path / "model" if (path / "model").is_dir() else path
    weights = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{path}: no weights")
    found = hashlib.sha256()
    for file in (weights, folder / CONFIG, folder / PREPROCESSING, *sorted(folder.glob("tokenizer/*"))):
        if file.is_file():
            found.update(str(file.relative_to(folder)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def _names(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.name, pair.text) for pair in pairs]
