"""Judging a system that generates: who may judge, what is judged, and that the numbers repeat."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jrl.data.scenes import ScenePicture
from jrl.data.scenes_drawing import COLOURS
from jrl.encoders import ImageEncoder
from jrl.generation import (
    CLASSES,
    FeatureNetwork,
    Judges,
    Pair,
    SceneClassifier,
    evaluate_generation,
    generate_pictures,
    judge,
    load_network,
    look,
    real_pictures,
    shared_parameters,
    train_scene_classifier,
)
from jrl.systems import XMCGAN
from tests.jrl.generation_fixtures import VIT, encoding_run, generating_run, scenes


def pairs(count: int = 24) -> list[Pair]:
    return [Pair(sample.key, sample.captions[0], sample.image) for sample in scenes()[:count]]


class Colours(nn.Module):
    """Mean colours, and logits that follow from them."""

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        means = pictures.mean(dim=(2, 3))
        return means, 9 * means


JUDGES = Judges(Colours(), encoding_run())


def test_the_numbers_repeat_whatever_the_batch() -> None:
    run = generating_run(sentence_pooling="code")
    before = torch.random.get_rng_state()
    scores = evaluate_generation(run, pairs(), JUDGES, candidates=10, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert scores == evaluate_generation(run, pairs(), JUDGES, candidates=10, seed=3)
    assert scores != evaluate_generation(run, pairs(), JUDGES, candidates=10, seed=4)
    # padding is part of the sentence with this pooling, and differs between texts: the batch must not decide it
    together, apart = (
        torch.cat(list(generate_pictures(run, [pair.text for pair in pairs()], batch_size=size)))
        for size in (24, 5)
    )
    assert int((together.int() - apart.int()).abs().max()) <= 1
    assert scores.pictures == 24 and scores.candidates == 10
    assert scores.fid is not None and scores.fid > 0
    assert scores.inception_score is not None and scores.inception_score >= 1
    assert scores.r_precision is not None and 0 <= scores.r_precision <= 1


def test_real_pictures_are_at_no_distance_from_themselves() -> None:
    seen = look(real_pictures(pairs(), 32, batch_size=7), JUDGES)
    scores = judge(seen, seen, [pair.text for pair in pairs()], JUDGES, candidates=10)
    assert scores.fid == pytest.approx(0.0, abs=1e-7)
    assert seen.features is not None and seen.features.shape == (24, 3)
    sample = scenes()[5]
    assert isinstance(sample.image, ScenePicture)
    (given,) = real_pictures(pairs()[5:6], 32)
    assert torch.equal(
        given[0].permute(1, 2, 0), torch.tensor(list(sample.image().tobytes())).view(32, 32, 3)
    )


def test_a_known_reference_gives_the_same_distance() -> None:
    run = generating_run()
    seen = look(real_pictures(pairs(), 32), JUDGES)
    once = evaluate_generation(run, pairs(), JUDGES, candidates=10)
    assert evaluate_generation(run, pairs(), JUDGES, candidates=10, reference=seen) == once


def test_a_judge_that_is_left_out_leaves_its_numbers_out() -> None:
    run = generating_run()
    scores = evaluate_generation(run, pairs(), Judges(encoder=encoding_run()), candidates=10)
    assert scores.fid is scores.inception_score is None
    assert scores.r_precision is not None
    scores = evaluate_generation(run, pairs(), Judges(network=nn.Sequential(nn.AvgPool2d(16), nn.Flatten())))
    assert scores.fid is not None
    assert scores.inception_score is scores.r_precision is None


def test_an_encoder_of_the_training_is_refused() -> None:
    run = generating_run()
    assert isinstance(run.system, XMCGAN)
    theirs = copy.deepcopy(run.system.text_encoder).to(torch.float64)
    with pytest.raises(ValueError, match=r"encoder: expected weights that no part .* 'text_encoder.model"):
        evaluate_generation(run, pairs(), Judges(encoder=encoding_run(text=theirs)), candidates=10)
    # the run itself
    with pytest.raises(ValueError, match="encoder: expected weights"):
        evaluate_generation(run, pairs(), Judges(encoder=run), candidates=10)


def test_a_picture_encoder_of_the_training_is_refused_in_every_role() -> None:
    torch.manual_seed(9)
    image = ImageEncoder(VIT)
    run = generating_run(image_encoder=image)
    with pytest.raises(ValueError, match="encoder: expected weights"):
        evaluate_generation(
            run, pairs(), Judges(encoder=encoding_run(image=copy.deepcopy(image))), candidates=10
        )
    network = FeatureNetwork(copy.deepcopy(image).eval())
    with pytest.raises(ValueError, match="network: expected weights"):
        evaluate_generation(run, pairs(), Judges(network=network))


def test_one_shared_tensor_is_enough_and_constant_ones_do_not_count() -> None:
    run, other = generating_run(), encoding_run()
    # fresh norms and biases are the same ones and zeros everywhere
    assert shared_parameters(run.system, other.system) == []
    names = dict(run.system.named_parameters())
    with torch.no_grad():
        (weight,) = (
            value
            for name, value in other.system.named_parameters()
            if name == "text_encoder.model.embeddings.position_embeddings.weight"
        )
        weight.copy_(names["text_encoder.model.embeddings.position_embeddings.weight"])
    (shared,) = shared_parameters(run.system, other.system)
    assert shared == ("text_encoder.model.embeddings.position_embeddings.weight",) * 2
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert shared_parameters(run.system, other.system) == []


def test_what_cannot_be_judged() -> None:
    run = generating_run()
    with pytest.raises(
        TypeError, match="run: expected a system that generates pictures, an XMCGAN, got CLIP"
    ):
        evaluate_generation(encoding_run(), pairs(), JUDGES)
    with pytest.raises(ValueError, match="pairs: expected at least one, got none"):
        evaluate_generation(run, [], JUDGES)
    with pytest.raises(ValueError, match="network: expected evaluation mode, got training mode"):
        evaluate_generation(run, pairs(), Judges(network=SceneClassifier(32, 2)))
    with pytest.raises(TypeError, match=r"network: expected features \[24, F\]"):
        evaluate_generation(run, pairs(), Judges(network=nn.AvgPool2d(16)))
    with pytest.raises(ValueError, match="texts: expected at least 100 different ones"):
        evaluate_generation(run, pairs(), Judges(encoder=encoding_run()))


def test_any_network_with_its_weights_from_a_file(tmp_path: Path) -> None:
    network = SceneClassifier(32, 2).eval()
    pictures = torch.rand(3, 3, 32, 32)
    program = torch.export.export(network, (pictures,), dynamic_shapes=({0: torch.export.Dim("B")},))
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = load_network(tmp_path / "network.pt2", allow_pickle=True)
    seen, again = (look(real_pictures(pairs(), 32), Judges(network=one)) for one in (network, loaded))
    assert seen.features is not None and again.features is not None
    torch.testing.assert_close(again.features, seen.features)
    two = FeatureNetwork(nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), nn.Linear(48, 5), lambda x: 2 * x - 1)
    features, logits = two(pictures)
    torch.testing.assert_close(features[0, 0], 2 * pictures[0, 0, :8, :8].mean() - 1)
    assert logits.shape == (3, 5)
    (tmp_path / "broken.pt2").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a program of `torch.export.save`"):
        load_network(tmp_path / "broken.pt2", allow_pickle=True)
    with pytest.raises(ValueError, match="are read only with allow_pickle=True"):
        load_network(tmp_path / "network.pt2")
    with pytest.raises(ValueError, match="features: expected a folder of `jrl scene-classifier` or a file"):
        load_network(Path(__file__))
    with pytest.raises(FileNotFoundError, match="features: no folder or file"):
        load_network(tmp_path / "nothing")


def test_the_classifier_learns_and_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    network, found = train_scene_classifier(32, scenes=64, epochs=1, width=2, max_objects=1, say=said.append)
    again, _ = train_scene_classifier(32, scenes=64, epochs=1, width=2, max_objects=1)
    for ours, theirs in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert found.scenes == 16 and said[0].startswith("epoch 1 of 1: loss")
    network.save(tmp_path)
    loaded = load_network(tmp_path)
    pictures = torch.rand(2, 3, 32, 32)
    for ours, theirs in zip(network(pictures), loaded(pictures), strict=True):
        assert torch.equal(ours, theirs)
    assert network(torch.rand(2, 3, 48, 48))[0].shape == (2, 8)
    (tmp_path / "config.json").write_text('{"network": "SceneClassifier", "image_size": 32, "width": 3}')
    with pytest.raises(ValueError, match="not a classifier of scenes"):
        load_network(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected a folder of `jrl scene-classifier`"):
        load_network(tmp_path)


def test_the_classifiers_scores() -> None:
    """max over cells of p(present) p(colour) p(shape), at the class's place."""
    network = SceneClassifier(32, 2).eval()
    pictures = torch.rand(2, 3, 32, 32)
    cells = network.cells(pictures)
    assert CLASSES[19] == "yellow star"
    expected = (
        cells.present.sigmoid() * cells.colour.softmax(dim=1)[:, 2] * cells.shape.softmax(dim=1)[:, 3]
    ).amax(dim=(1, 2))
    torch.testing.assert_close(network(pictures)[1][:, 19].exp(), expected)
    with pytest.raises(ValueError, match="image_size: expected 32 or 64, got 48"):
        SceneClassifier(48)


def test_the_classifier_learns_colours_in_a_few_steps() -> None:
    network, _ = train_scene_classifier(32, scenes=512, epochs=10, width=8, max_objects=1)
    with torch.no_grad():
        (pictures,) = real_pictures(pairs(24), 32)
        cells = network.cells(pictures.float() / 255)
    right = total = 0
    for place, sample in enumerate(scenes()):
        mask = torch.from_numpy(sample.load_mask()[::2, ::2].astype("int64"))
        for thing in sample.objects:
            said = cells.colour[place].argmax(dim=0)[mask == thing.mask_id]
            right += int((said == list(COLOURS).index(thing.attributes[-1])).sum())
            total += len(said)
    # eight colours: 0.125 by chance
    assert right / total > 0.6
