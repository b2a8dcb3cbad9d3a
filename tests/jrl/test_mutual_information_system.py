"""The mutual-information system: learning, layers, modes, backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jrl.encoders import ImageEncoder
from jrl.objectives import DeepInfoMax, MaskedWords, MutualInformationEstimator
from jrl.systems import LayerPair, MutualInformation

from .mutual_information_fixtures import RESNET, SPECIAL, small, squares, train


@pytest.fixture(scope="module")
def trained() -> MutualInformation:
    system = small()
    train(system, 120)
    return system.eval()


def test_learns_who_belongs_together_and_where(trained: MutualInformation) -> None:
    batch, cell = squares(64, 10_000)
    before = small().eval().compatibility(batch)
    after = trained.compatibility(batch)
    assert float(before["bound"]) < 0.5
    # two pairs of colours of fifteen cannot be told apart, so log 64 is out of reach: at most about log 15
    assert float(after["bound"]) > 1.5
    assert float(after["ceiling"]) == pytest.approx(math.log(64))
    found = trained.word_regions(**batch)
    assert found.grid == (4, 4)
    assert found.mask.sum(dim=1).tolist() == [2] * 64
    torch.testing.assert_close(found.attention.sum(dim=2), found.mask.float())
    pointed = found.attention[:, 1:3].argmax(dim=2) == cell
    # a constant cell is right once in sixteen
    assert float(pointed.float().mean()) > 0.5
    image, text = (
        trained.encode_image(batch["pixel_values"]),
        trained.encode_text(batch["input_ids"], batch["attention_mask"]),
    )
    similar = image.global_ @ text.global_.T
    same = (
        batch["input_ids"][:, 1:3].sort().values[:, None] == batch["input_ids"][:, 1:3].sort().values
    ).all(2)
    best = similar.argmax(dim=1)
    assert float(same[torch.arange(64), best].float().mean()) > 0.5


def test_scores_and_loss_are_the_parts_put_together(trained: MutualInformation) -> None:
    batch, _ = squares(6, 3)
    losses, plots = trained(batch)
    scores = trained.critic_scores(**batch)
    logits = scores.log_softmax(1).diagonal().mean() + scores.log_softmax(0).diagonal().mean()
    assert losses["joint"].item() == pytest.approx(-(math.log(6) + logits.item() / 2), rel=1e-4)
    assert set(plots) == {"bound", "ceiling", "bound_last"}
    assert plots["bound"].item() == plots["bound_last"].item() == pytest.approx(-losses["joint"].item())
    few = trained.critic_scores(batch["pixel_values"], batch["input_ids"][:2], batch["attention_mask"][:2])
    torch.testing.assert_close(few, scores[:, :2])
    # padding changes nothing
    more = {
        **batch,
        "input_ids": F.pad(batch["input_ids"], (0, 3)),
        "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
    }
    torch.testing.assert_close(trained.critic_scores(**more), scores)
    torch.testing.assert_close(
        trained.encode_text(more["input_ids"], more["attention_mask"]).global_,
        trained.encode_text(batch["input_ids"], batch["attention_mask"]).global_,
    )


def test_global_vectors(trained: MutualInformation) -> None:
    """They are the critic's score under even attention, up to length."""
    batch, _ = squares(4, 5)
    critic = trained._critic_of(-1)
    output = trained.image_encoder(batch["pixel_values"])
    values = critic.image_value(output.tokens.flatten(0, 1)).unflatten(0, output.tokens.shape[:2]).mean(dim=1)
    image = trained.encode_image(batch["pixel_values"])
    torch.testing.assert_close(image.global_, F.normalize(values, dim=1))
    torch.testing.assert_close(image.tokens, output.tokens)
    words = trained.text_encoder(batch["input_ids"], batch["attention_mask"]).tokens[:, 1:3]
    text = trained.encode_text(batch["input_ids"], batch["attention_mask"])
    wanted = critic.word_value(words.flatten(0, 1)).unflatten(0, (4, 2)).mean(dim=1)
    torch.testing.assert_close(text.global_, F.normalize(wanted, dim=1))
    plain = small(embedding="encoder").eval()
    pooled = plain.image_encoder(batch["pixel_values"]).global_
    torch.testing.assert_close(plain.encode_image(batch["pixel_values"]).global_, F.normalize(pooled, dim=1))


def test_several_layers() -> None:
    pairs = [LayerPair(), LayerPair(image=1, text=0, weight=0.5, image_pool=2)]
    system = small(layers=pairs)
    assert set(system.critics) == {"last", "image_1_text_0"}
    losses, plots = system.train()(squares(8, 0)[0])
    total = plots["bound_last"] + 0.5 * plots["bound_image_1_text_0"]
    assert plots["bound"].item() == pytest.approx(total.item(), rel=1e-5)
    assert losses["joint"].item() == pytest.approx(-total.item(), rel=1e-5)
    assert plots["ceiling"].item() == pytest.approx(1.5 * math.log(8))
    losses["joint"].backward()
    for critic in system.critics.values():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())


def test_every_other_word() -> None:
    """As if the caption had lost the words between; embeddings see no neighbours, so nothing else changes."""
    sparse = small(layers=[LayerPair(text=0, text_stride=2)]).eval()
    plain = small(layers=[LayerPair(text=0)]).eval()
    plain.load_state_dict(sparse.state_dict())
    batch = squares(4, 0)[0]
    words = plain._words(batch["input_ids"], batch["attention_mask"])
    between = words & ((words.cumsum(dim=1) - 1) % 2 == 1)
    assert bool(between.any())
    fewer = {**batch, "attention_mask": batch["attention_mask"] * ~between}
    bound = sparse.compatibility(batch)["bound"]
    torch.testing.assert_close(bound, plain.compatibility(fewer)["bound"])
    assert abs(bound.item() - plain.compatibility(batch)["bound"].item()) > 1e-4


@pytest.mark.parametrize(
    ("critic", "measure", "layers"),
    [
        ({}, None, None),
        ({"per_word": True}, None, None),
        ({"length_norm": "mean"}, None, None),
        ({}, "nce", None),
        ({}, "jsd", None),
        ({}, "dv", None),
        ({}, None, [LayerPair(image=1, text=0, image_pool=2), LayerPair(weight=0.5)]),
    ],
    ids=["sum", "word", "mean", "infomax-nce", "infomax-jsd", "infomax-dv", "layers"],
)
def test_backends_take_the_same_steps(
    critic: dict[str, Any], measure: str | None, layers: list[LayerPair] | None
) -> None:
    runs = []
    for backend in ("reference", "auto"):
        direction = "text_to_image" if critic.get("per_word") else "both"
        torch.manual_seed(1)
        objective = None
        if measure is not None:
            objective = DeepInfoMax(24, 24, units=16, measure=measure, backend=backend)
        system = small(
            critic={"backend": backend, **critic},
            estimator=MutualInformationEstimator(direction=direction, backend=backend),
            layers=layers,
            image_objective=objective,
        )
        runs.append(train(system, 20, rows=16, lr=1e-3))
    torch.testing.assert_close(*(torch.tensor(losses) for losses in runs), rtol=2e-3, atol=2e-3)
    assert runs[0][-1] < runs[0][0]


def test_frozen_encoders_rest() -> None:
    system = small(freeze=["image", "text"]).train()
    assert not system.image_encoder.training
    assert not system.text_encoder.training
    assert system.critics.training
    state = {name: value.clone() for name, value in system.state_dict().items()}
    losses = train(system, 30)
    moved = {
        name.split(".")[0]
        for name, value in system.state_dict().items()
        if not torch.equal(value, state[name])
    }
    assert moved == {"critics"}
    assert sum(losses[-5:]) < sum(losses[:5])
    image = small(freeze=["image"])
    image.train()(squares(4, 0)[0])[0]["joint"].backward()
    assert all(p.grad is None for p in image.image_encoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in image.text_encoder.parameters())


def test_objectives_of_one_side_and_their_optimisers() -> None:
    objective = DeepInfoMax(24, 24, units=16, global_weight=0.5, prior_weight=0.1, regions=16)
    words = MaskedWords(24, 32, 4, SPECIAL)
    system = small(image_objective=objective, image_weight=0.5, text_objective=words, text_weight=2.0).train()
    losses, plots = system(squares(8, 0)[0])
    assert set(losses) == {
        "joint",
        "image_local",
        "image_global",
        "image_prior",
        "image_discriminator",
        "masked_words",
    }
    assert {"masked_words_accuracy", "image_local", "image_discriminator_accuracy"} < set(plots)
    assert losses["image_local"].item() == pytest.approx(0.5 * plots["image_local"].item())
    first, second = system.optimization()
    assert first.losses is not None
    assert second.losses == ("image_discriminator",)
    assert set(first.losses) | set(second.losses) == set(losses)
    ids = [id(p) for spec in (first, second) for p in spec.parameters]
    assert sorted(ids) == sorted(id(p) for p in system.parameters())
    before = small(joint_weight=0.0, image_objective=DeepInfoMax(24, 24, units=16)).train()
    losses, _ = before(squares(8, 0)[0])
    assert set(losses) == {"image_local"}
    losses["image_local"].backward()
    assert all(p.grad is None for p in (*before.critics.parameters(), *before.text_encoder.parameters()))
    assert before.compatibility(squares(4, 0)[0]) == {}


def trained_parts(system: MutualInformation) -> set[str]:
    return {name.split(".")[0] for name, value in system.named_parameters() if value.requires_grad}


def test_what_no_loss_reads_is_not_trained() -> None:
    """Data parallelism waits for the gradient of every weight that is trained."""
    image = small(joint_weight=0.0, image_objective=DeepInfoMax(24, 24, units=16))
    assert trained_parts(image) == {"image_encoder", "image_objective"}
    text = small(joint_weight=0.0, text_objective=MaskedWords(24, 32, 4, SPECIAL))
    assert trained_parts(text) == {"text_encoder", "text_objective"}
    for system in (image, text, small(), small(layers=[LayerPair(image=1, text=0), LayerPair()])):
        assert system.idle is None
        losses, _ = system.train()(squares(8, 0)[0])
        torch.stack(list(losses.values())).sum().backward()
        assert all(value.grad is not None for value in system.parameters() if value.requires_grad)
    idle = small(layers=[LayerPair(image=1)]).idle
    assert idle == "the image encoder's layers after 1, which no pair of `layers` reads"
    assert small(layers=[LayerPair(text=0)]).idle == idle.replace("image", "text").replace("1", "0")
    assert small(layers=[LayerPair(text=0)], freeze=["text"]).idle is None
    objective = MaskedWords(24, 32, 4, SPECIAL)
    assert small(layers=[LayerPair(text=0)], text_objective=objective).idle is None
    assert small(layers=[LayerPair(text=1)]).idle is None


def test_prior_matching_reaches_the_whole_of_the_unit_interval() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(RESNET).train()
    objective = DeepInfoMax(24, 24, units=8, local_weight=0.0, prior_weight=1.0)
    assert objective.discriminator is not None and objective.code is not None
    players = (
        ("discriminator", torch.optim.Adam(objective.discriminator.parameters(), lr=1e-3)),
        ("prior", torch.optim.Adam([*encoder.parameters(), *objective.code.parameters()], lr=1e-3)),
    )
    for step in range(60):
        output = encoder(squares(32, step)[0]["pixel_values"])
        losses, _ = objective(output.tokens, output.global_)
        for name, player in players:
            parameters = player.param_groups[0]["params"]
            gradients = torch.autograd.grad(losses[name], parameters, retain_graph=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        for _, player in players:
            player.step()
    code = objective.code(encoder.eval()(squares(256, 999)[0]["pixel_values"]).global_).sigmoid()
    assert 0.25 < float((code < 0.5).float().mean()) < 0.75
    assert float(code.min()) < 0.4 and float(code.max()) > 0.6


def test_duplicate_captions_are_left_out() -> None:
    batch, _ = squares(6, 0)
    batch["input_ids"][1] = batch["input_ids"][0]
    same = (batch["input_ids"][:, None] == batch["input_ids"]).all(dim=2) & ~torch.eye(6, dtype=torch.bool)
    assert same[0, 1]
    scores = small().eval().critic_scores(**batch).masked_fill(same, -math.inf)
    wanted = (scores.log_softmax(1).diagonal().mean() + scores.log_softmax(0).diagonal().mean()) / 2
    losses, plots = small(duplicate_captions="exclude").eval()(batch)
    ceiling = (6 - same.sum(dim=1)).log().mean()
    assert plots["ceiling"].item() == pytest.approx(ceiling.item())
    assert losses["joint"].item() == pytest.approx(-(ceiling + wanted).item(), rel=1e-4, abs=1e-6)
    batch["input_ids"][:] = batch["input_ids"][0]
    plots = small(duplicate_captions="exclude").eval().compatibility(batch)
    assert plots["bound"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("per_word", [False, True], ids=["sum", "word"])
def test_a_caption_without_words_says_nothing(per_word: bool) -> None:
    system = small(critic={"per_word": per_word, "projection": "mlp"}).eval()
    batch, _ = squares(6, 0)
    batch["attention_mask"][2, 1:] = False
    found = system.compatibility(batch)
    assert found["ceiling"].item() == pytest.approx(math.log(6 if per_word else 5))
    if not per_word:
        rest = {name: value[torch.arange(6) != 2] for name, value in batch.items()}
        torch.testing.assert_close(found, system.compatibility(rest))
    batch["attention_mask"][:, 1:] = False
    assert not any(system.compatibility(batch).values())
    losses, _ = system(batch)
    losses["joint"].backward()
    assert not any(value.grad.any() for value in system.parameters() if value.grad is not None)
