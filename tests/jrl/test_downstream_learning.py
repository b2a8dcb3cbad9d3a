"""Every task learns: an encoder trained from scratch on one of them, then frozen under a head for each."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from jrl.data.images import ImageTransform, load_image
from jrl.data.sample import Sample
from jrl.data.scenes import read_scenes
from jrl.downstream import (
    Captioning,
    Classification,
    Detection,
    FrozenFeatures,
    Result,
    ScenePart,
    Segmentation,
    Task,
    VisualQuestions,
    fit_head,
)
from jrl.encoders import EncoderOutput

# few enough to be learned from a few hundred pictures
KNOWN = {"circle", "cross", "triangle"}, {"red", "green", "blue"}
Data = Mapping[str, ScenePart]


class SmallEncoder(nn.Module):
    """Four convolutions to tokens at a stride of 8, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 24, 2), (24, 48, 2), (48, 96, 2), (96, 96, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> EncoderOutput:
        tokens = self.layers(pixels).flatten(2).transpose(1, 2)
        return EncoderOutput(tokens.amax(dim=1), tokens)


def fresh_encoder() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallEncoder()


def part(samples: list[Sample]) -> ScenePart:
    transform = ImageTransform(32, (0.5,) * 3, (0.5,) * 3)
    return ScenePart(samples, torch.stack([transform(load_image(sample.image)) for sample in samples]))


@pytest.fixture(scope="module")
def data() -> Data:
    shapes, colours = KNOWN
    samples = read_scenes(
        train=8000,
        val=0,
        test=0,
        test_compositional=0,
        held_out=0,
        size=32,
        languages=["en"],
        max_objects=2,
        seed=7,
    )
    known = [
        sample
        for sample in samples
        if all(thing.label in shapes and colours & set(thing.attributes) for thing in sample.objects)
    ]
    return {"val": part(known[:80]), "test": part(known[80:200]), "train": part(known[200:600])}


@pytest.fixture(scope="module")
def trained(data: Data) -> Result:
    """The encoder that the others stand on, trained with the head that says what is in the picture."""
    return fit_head(
        fresh_encoder(), Classification(), data, frozen=False, epochs=20, lr=2e-3, encoder_lr_factor=1.0
    )


@pytest.fixture(scope="module")
def features(trained: Result, data: Data) -> FrozenFeatures:
    return FrozenFeatures(trained.encoder, data)


def test_the_encoder_learns_with_its_head(trained: Result, data: Data) -> None:
    assert not trained.frozen
    assert trained.baseline["mean_average_precision"] < 0.45
    assert trained.scores["mean_average_precision"] > trained.baseline["mean_average_precision"] + 0.25
    assert trained.scores["colours"] > 0.9
    # the very encoder without training sees less with the same kind of head
    other = fit_head(fresh_encoder(), Classification(), data)
    assert other.scores["mean_average_precision"] < trained.scores["mean_average_precision"] - 0.1


# beside the blind baseline: how much better the score that stands for the task must be
BARS: list[tuple[Task, int, float]] = [
    (Classification(), 10, 0.25),
    (Segmentation(), 20, 0.05),
    (Detection(48), 15, 0.1),
    (Captioning(48), 15, 0.2),
    (VisualQuestions(48), 6, 0.12),
]


@pytest.mark.parametrize(("task", "epochs", "bar"), BARS, ids=[task.name for task, _, _ in BARS])
def test_a_head_learns_on_the_frozen_encoder(
    task: Task, epochs: int, bar: float, trained: Result, features: FrozenFeatures, data: Data
) -> None:
    before = copy.deepcopy(trained.encoder.state_dict())
    result = fit_head(trained.encoder, task, data, epochs=epochs, features=features)
    assert result.scores[task.metric] > result.baseline[task.metric] + bar, (result.scores, result.baseline)
    assert result.losses[result.best_epoch - 1][1] == min(loss for _, loss in result.losses)
    assert all(torch.equal(value, before[name]) for name, value in trained.encoder.state_dict().items())
    # what is kept are the weights of the best epoch: they say the same of the test part again
    assert len(result.examples["image"]) == len(next(iter(result.predictions.values())))
    with torch.no_grad():
        again = task.predict(
            result.head,
            features("test", result.examples["image"]),
            result.examples,
        )
    assert task.score(again, result.examples) == pytest.approx(result.scores, abs=1e-6)
    if task.name == "vqa":
        assert result.scores["which_colour"] > result.baseline["which_colour"] + 0.4


def test_the_same_seed_gives_the_same_head(data: Data) -> None:
    state = torch.get_rng_state()
    few = {name: ScenePart(each.samples[:40], each.pixels[:40]) for name, each in data.items()}
    options = {"epochs": 2, "encoder_lr_factor": 1.0, "frozen": False}
    encoder = fresh_encoder()
    before = copy.deepcopy(encoder.state_dict())
    one, two, three = (
        fit_head(encoder, VisualQuestions(16), few, seed=seed, **options) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), state)
    # a copy is trained, never the encoder that was passed
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not torch.equal(one.encoder.state_dict()["layers.0.weight"], before["layers.0.weight"])
    assert one.losses == two.losses != three.losses
    for module in ("head", "encoder"):
        states = [getattr(result, module).state_dict() for result in (one, two)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Flat(SmallEncoder):
    def forward(self, pixels: Tensor) -> EncoderOutput:
        output = super().forward(pixels)
        return EncoderOutput(output.global_, output.tokens[:, :8])


def test_errors_name_the_matter(data: Data) -> None:
    encoder, task = fresh_encoder(), Classification()
    with pytest.raises(ValueError, match="data: expected the parts train, val, test, test missing"):
        fit_head(encoder, task, {name: data[name] for name in ("train", "val")})
    for options, words in (
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"lr": float("nan")}, "lr: expected a positive number"),
        ({"encoder_lr_factor": 0.0}, "encoder_lr_factor: expected a positive number"),
        ({"seed": -1}, "seed: expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            fit_head(encoder, task, data, **options)
    with pytest.raises(TypeError, match="expected it to return an EncoderOutput, got Tensor"):
        fit_head(nn.Flatten(), task, data, epochs=1)
    # eight tokens lie on no grid: the vector can still be probed, the tokens cannot
    few = {name: ScenePart(each.samples[:16], each.pixels[:16]) for name, each in data.items()}
    assert fit_head(Flat(), task, few, epochs=1).best_epoch == 1
    with pytest.raises(ValueError, match="h·h patches"):
        fit_head(Flat(), Segmentation(), few, epochs=1)
    broken = dict(few, train=ScenePart(few["train"].samples, few["train"].pixels * float("nan")))
    with pytest.raises(FloatingPointError, match="classification: the loss is nan in epoch 1"):
        fit_head(encoder, task, broken, epochs=1)
