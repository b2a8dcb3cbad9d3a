"""A text-to-image system judged: distance and score of its pictures, whether their texts are known, and their objects found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from jrl.data.images import ImageTransform, load_image
from jrl.data.sample import ImageSource
from jrl.evaluation.generation import frechet_inception_distance, inception_score
from jrl.evaluation.object_accuracy import named_objects, object_accuracy
from jrl.evaluation.r_precision import check_candidates, r_precision
from jrl.generation.detector import Detector
from jrl.generation.independence import check_independent
from jrl.systems import XMCGAN
from jrl.training.run import Run

_NOISE = 1_000_003


@dataclass(frozen=True)
class Pair:
    """A text to generate from, and the real picture that it describes."""

    name: str
    text: str
    image: ImageSource


@dataclass(frozen=True)
class Judges:
    """What looks at the pictures; each is left out where it is None.

    Attributes:
        network: in evaluation mode, from pictures [B, 3, H, W] in [0, 1] to features [B, F], or to a pair of features and
            logits [B, classes]: the Frechet distance, and the inception score with logits.
        encoder: a run that no part of the generator was trained with: R-precision.
        detector: semantic object accuracy, over the texts that name what it knows; left out where none does.
    """

    network: nn.Module | None = None
    encoder: Run | None = None
    detector: Detector | None = None


@dataclass(frozen=True)
class Scores:
    """What the judges say of one set of pictures; None where a judge was left out.

    Attributes:
        pictures: how many.
        fid: Frechet distance to the real pictures of the texts; lower is better, as for nothing else here.
        inception_score: mean over the splits.
        inception_score_deviation: over the splits; None for one split.
        r_precision: share of the pictures whose own text comes first among `candidates`.
        mean_rank: of the own text, from 1.
        candidates: of R-precision.
        soa_c: share of the pictures in which a class that the text names is found, averaged over the classes.
        soa_i: the same over all pairs of a picture and a class that its text names.
        found_unnamed: the same over all pairs of a picture and a class that its text does not name.
    """

    pictures: int
    fid: float | None = None
    inception_score: float | None = None
    inception_score_deviation: float | None = None
    r_precision: float | None = None
    mean_rank: float | None = None
    candidates: int | None = None
    soa_c: float | None = None
    soa_i: float | None = None
    found_unnamed: float | None = None


@dataclass
class Seen:
    """What the judges saw of a set of pictures, a row each.

    Attributes:
        pictures: how many.
        features: [N, F].
        logits: [N, classes].
        vectors: [N, D] of the encoder.
        found: [N, C] bool of the detector.
    """

    pictures: int = 0
    features: Tensor | None = None
    logits: Tensor | None = None
    vectors: Tensor | None = None
    found: Tensor | None = None


@dataclass
class _Rows:
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def generate_pictures(
    run: Run, texts: Sequence[str], *, seed: int = 0, batch_size: int = 64
) -> Iterator[Tensor]:
    """Pictures of texts by the averaged generator, batch by batch, as they would be saved: uint8 [B, 3, H, W].

    Text i has the noise i of a sequence that depends on `seed` and the number of texts. All texts are padded to the run's
    longest, so that no picture depends on its batch: with `sentence_pooling` "code" padding is part of the sentence.

    Args:
        run: of an `XMCGAN`.
        texts: one or more.
        seed: of the noise.
        batch_size: pictures generated together.

    Raises:
        TypeError: the run's system is no `XMCGAN`.
    """
    system = _generating(run)
    source = torch.Generator().manual_seed(_NOISE + seed)
    noise = torch.randn(len(texts), system.generator.noise_dim, generator=source)
    for rows in torch.arange(len(texts)).split(batch_size):
        tokens = run.tokenizer(
            [texts[row] for row in rows.tolist()],
            padding="max_length",
            truncation=True,
            max_length=run.max_length,
            return_tensors="pt",
        )
        pictures = system.generate(
            tokens["input_ids"].to(run.device),
            tokens["attention_mask"].to(run.device),
            noise=noise[rows].to(run.device),
        )
        yield (pictures.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def real_pictures(pairs: Sequence[Pair], size: int, batch_size: int = 64) -> Iterator[Tensor]:
    """The real pictures at the generator's size, batch by batch: uint8 [B, 3, size, size].

    Raises:
        ImageError: a picture that cannot be used.
    """
    transform = ImageTransform(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for start in range(0, len(pairs), batch_size):
        some = [
            transform(load_image(pair.image, name=pair.name)) for pair in pairs[start : start + batch_size]
        ]
        yield (torch.stack(some) * 255).round().to(torch.uint8)


@torch.no_grad()
def look(pictures: Iterable[Tensor], judges: Judges, device: str | torch.device = "cpu") -> Seen:
    """Show pictures to the judges, batch by batch; nothing of the pictures themselves is kept.

    Args:
        pictures: uint8 [B, 3, H, W] each.
        judges: who looks.
        device: of the pictures that network and detector get.

    Raises:
        TypeError: the network returns something else than features, or features and logits; the detector something else than
            scores.
        ValueError: the network or the detector is in training mode.
    """
    _check_at_rest(judges.network, "network")
    _check_at_rest(judges.detector, "detector")
    rows, seen = _Rows(), Seen()
    for some in pictures:
        seen.pictures += len(some)
        if judges.network is not None:
            features, logits = _features(judges.network, some.to(device).float() / 255)
            rows.features.append(features)
            if logits is not None:
                rows.logits.append(logits)
        if judges.encoder is not None:
            images = [(f"picture {place}", _picture(one)) for place, one in enumerate(some)]
            rows.vectors.append(judges.encoder.encode_images(images)[0])
        if judges.detector is not None:
            scores = judges.detector(some.to(device).float() / 255)
            if scores.shape != (expected := (len(some), len(judges.detector.classes))):
                raise TypeError(f"detector: expected scores {list(expected)}, got {list(scores.shape)}")
            rows.found.append((scores >= judges.detector.threshold).cpu())
    for name, found in vars(rows).items():
        setattr(seen, name, torch.cat(found) if found else None)
    return seen


def judge(
    seen: Seen,
    reference: Seen | None,
    texts: Sequence[str],
    judges: Judges,
    *,
    candidates: int = 100,
    splits: int = 1,
    seed: int = 0,
) -> Scores:
    """The numbers of one set of pictures.

    Args:
        seen: of the pictures, text i that of picture i.
        reference: of the real pictures that the Frechet distance is to; None for no distance.
        texts: one a picture.
        judges: who looked.
        candidates: texts that R-precision compares, the own one among them.
        splits: of the inception score.
        seed: of the mismatched texts and of the splits.
    """
    values: dict[str, float | int | None] = {}
    if seen.features is not None and reference is not None and reference.features is not None:
        values["fid"] = frechet_inception_distance(reference.features, seen.features)
    if seen.logits is not None:
        score, deviation = inception_score(seen.logits, splits=splits, seed=seed)
        values |= {"inception_score": score, "inception_score_deviation": deviation}
    if seen.vectors is not None:
        assert judges.encoder is not None
        vectors = judges.encoder.encode_texts(texts)
        found = r_precision(seen.vectors, vectors, texts, candidates=candidates, seed=seed)
        values |= {"r_precision": found.precision, "mean_rank": found.mean_rank, "candidates": candidates}
    if seen.found is not None:
        assert judges.detector is not None
        classes = judges.detector.classes
        named = named_objects(texts, classes)
        accuracy = object_accuracy(seen.found, named, [one.name for one in classes])
        values |= {"soa_c": accuracy.soa_c, "soa_i": accuracy.soa_i, "found_unnamed": accuracy.unnamed}
    return Scores(seen.pictures, **values)  # type: ignore[arg-type]


def evaluate_generation(
    run: Run,
    pairs: Sequence[Pair],
    judges: Judges,
    *,
    reference: Seen | None = None,
    candidates: int = 100,
    splits: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> Scores:
    """Generate a picture of each text and let the judges look at it.

    The same arguments on the same machine give the same numbers, whatever the batch size (to rounding).

    Args:
        run: of an `XMCGAN`; `Run(system, tokenizer, transform, max_length)` makes one of a system at hand.
        pairs: texts with their real pictures.
        judges: none of them may share weights with the system.
        reference: what the judges saw of the real pictures, `look(real_pictures(pairs, size), judges)`, where it is known
            already.
        candidates: texts that R-precision compares, the own one among them.
        splits: of the inception score.
        seed: of noise, mismatched texts and splits.
        batch_size: pictures generated together.

    Raises:
        TypeError: the run's system is no `XMCGAN`.
        ValueError: no pair, a judge that was trained with, or a number that does not fit the metric.
    """
    size = picture_size(run)
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")
    check_judges(run, judges)
    texts = [pair.text for pair in pairs]
    judges = judges_of(texts, judges, candidates=candidates, splits=splits)
    if reference is None and judges.network is not None:
        only = Judges(network=judges.network)
        reference = look(real_pictures(pairs, size, batch_size), only, run.device)
    seen = look(generate_pictures(run, texts, seed=seed, batch_size=batch_size), judges, run.device)
    return judge(seen, reference, texts, judges, candidates=candidates, splits=splits, seed=seed)


def check_judges(run: Run, judges: Judges) -> None:
    """Refuse a judge that shares weights with what it is to judge.

    Raises:
        ValueError: see `check_independent`.
    """
    if judges.network is not None:
        check_independent(run.system, judges.network, "network")
    if judges.encoder is not None:
        check_independent(run.system, judges.encoder.system, "encoder")
    if isinstance(judges.detector, nn.Module):
        check_independent(run.system, judges.detector, "detector")


def judges_of(texts: Sequence[str], judges: Judges, *, candidates: int, splits: int) -> Judges:
    """The judges that have something to say of these texts, before a picture is generated: a detector needs a class to look for.

    Raises:
        ValueError: the texts are too few for the metrics of the others.
    """
    if judges.network is not None and not 1 <= splits <= len(texts):
        raise ValueError(f"splits: expected 1 to {len(texts)}, the number of texts, got {splits}")
    if judges.encoder is not None:
        check_candidates(texts, candidates)
    if judges.detector is not None and not named_objects(texts, judges.detector.classes).any():
        return replace(judges, detector=None)
    return judges


def picture_size(run: Run) -> int:
    """Side of the pictures that a run's system generates.

    Raises:
        TypeError: the run's system is no `XMCGAN`.
    """
    return int(_generating(run).generator.config["image_size"])


def _generating(run: Run) -> XMCGAN:
    if not isinstance(run.system, XMCGAN):
        raise TypeError(
            f"run: expected a system that generates pictures, an XMCGAN, got {type(run.system).__name__}"
        )
    return run.system


def _features(network: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
    found = network(pictures)
    features, logits = found if isinstance(found, (tuple, list)) and len(found) == 2 else (found, None)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(pictures):
        raise TypeError(
            f"network: expected features [{len(pictures)}, F], or a pair of features and logits, got "
            f"{list(features.shape) if isinstance(features, Tensor) else type(features).__name__}"
        )
    return features.float().cpu(), None if logits is None else logits.float().cpu()


def _check_at_rest(judge: object, argument: str) -> None:
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    parts = judge.modules() if isinstance(judge, nn.Module) else ()
    if any(part.training for part in parts if isinstance(part, kinds)):
        raise ValueError(f"{argument}: expected evaluation mode, got training mode; call {argument}.eval()")


def _picture(pixels: Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
