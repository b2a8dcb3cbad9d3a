"""XMC-GAN as a system: whose losses move whom, what is kept, and that the fused ops train as the reference does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jrl.encoders import ImageEncoder, TextEncoder
from jrl.objectives.generation import pair_contrastive, word_contrastive
from jrl.systems import load_system
from jrl.systems.xmc_gan import XMCGAN, Discriminator, Generator

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"model_type": "bert", "vocab_size": 40, "max_position_embeddings": 16, **SMALL}
VIT = {"model_type": "vit", "image_size": 16, "patch_size": 8, **SMALL}


def build(seed: int = 0, **options: Any) -> XMCGAN:
    torch.manual_seed(seed)
    return XMCGAN(
        Generator(32, text_dim=16, width=4, noise_dim=6, condition_dim=5),
        Discriminator(32, text_dim=16, width=4),
        TextEncoder(BERT),
        **options,
    )


def batch(pairs: int = 4, seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    length = torch.tensor([7, 5, 3, 1]).repeat(pairs)[:pairs]
    return {
        "pixel_values": torch.rand(pairs, 3, 32, 32, generator=source),
        "input_ids": torch.randint(1, 40, (pairs, 7), generator=source),
        "attention_mask": (torch.arange(7) < length[:, None]).long(),
        "noise": torch.randn(pairs, 6, generator=source),
    }


def test_losses_by_name() -> None:
    system = build(image_encoder=ImageEncoder(VIT))
    losses, plots = system(batch())
    real, fake = ("real_sentence", "real_word"), ("fake_sentence", "fake_word")
    assert set(losses) == {
        "hinge_discriminator", *real, "hinge_generator", *fake, "image", "image_pretrained"
    }  # fmt: skip
    assert {"accuracy_real_word", "entropy_fake_sentence", "logit_real", "spread"} <= set(plots)
    assert [spec.losses for spec in system.optimization()] == [
        ("hinge_discriminator", *real),
        ("hinge_generator", *fake, "image", "image_pretrained"),
    ]


def test_chosen_losses_and_their_weights() -> None:
    once, _ = build(losses={"word": 1.0})(batch())
    assert set(once) == {"hinge_discriminator", "real_word", "hinge_generator", "fake_word"}
    twice, _ = build(losses={"word": 2.5})(batch())
    torch.testing.assert_close(twice["fake_word"], 2.5 * once["fake_word"])
    none, _ = build(losses={})(batch())
    assert set(none) == {"hinge_discriminator", "hinge_generator"}


def test_only_the_discriminator_trains_where_the_generator_rests() -> None:
    system = build()
    system.generator.requires_grad_(False)
    losses, _ = system(batch())
    assert set(losses) == {"hinge_discriminator", "real_sentence", "real_word"}


def test_real_pairs_alone_teach_the_discriminator() -> None:
    """The contrastive losses of generated pictures are the generator's: none of theirs is in the discriminator's."""
    system, given = build().eval(), batch()
    losses, _ = system(given)
    texts = losses["real_sentence"] + losses["real_word"]
    for grad in torch.autograd.grad(texts, list(system.generator.parameters())):
        assert bool((grad == 0).all())
    given["noise"] = given["noise"] + 1
    again, _ = system(given)
    for name in ("sentence", "word"):
        torch.testing.assert_close(again[f"real_{name}"], losses[f"real_{name}"])
    assert abs(again["fake_word"].item() - losses["fake_word"].item()) > 1e-3


def test_turns_cut_the_batch() -> None:
    system, given = build(discriminator_steps=3), batch(7)
    turns = system.turns(given)
    assert [turn.optimizers for turn in turns] == [(0,), (0,), (0, 1)]
    assert system.steps_per_batch == 4
    for name, value in given.items():
        torch.testing.assert_close(torch.cat([turn.batch[name] for turn in turns]), value)
    with pytest.raises(ValueError, match="batch: expected at least 3 pairs, one a step, got 2"):
        system.turns(batch(2))


def test_average_follows_the_generator() -> None:
    system = build(average_decay=0.75)
    before = system.average.pixels.weight.clone()
    with torch.no_grad():
        system.generator.pixels.weight += 1
        system.generator.norm.norm.running_mean.fill_(3)
    first, last = system.turns(batch())
    system.after_turn(first)
    assert torch.equal(system.average.pixels.weight, before)
    system.after_turn(last)
    torch.testing.assert_close(system.average.pixels.weight, before + 0.25)
    assert bool((system.average.norm.norm.running_mean == 3).all())
    assert not any(p.requires_grad for p in system.average.parameters())


def test_frozen_parts_rest() -> None:
    system = build(image_encoder=ImageEncoder(VIT)).train()
    assert system.generator.training and system.discriminator.training
    for part in (system.average, system.text_encoder, system.image_encoder):
        assert part is not None and not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_sentence_pooling() -> None:
    """The code divides the sum over all places by the number of real ones; padding then counts."""
    given = batch()
    ids, mask = given["input_ids"], given["attention_mask"]
    code, mean, own = (build(sentence_pooling=kind) for kind in ("code", "mean", "encoder"))
    _, words, _ = code.embed(ids, mask)
    weight = mask[:, :, None].float()
    torch.testing.assert_close(code.embed(ids, mask)[0], words.sum(1) / weight.sum(1))
    torch.testing.assert_close(mean.embed(ids, mask)[0], (words * weight).sum(1) / weight.sum(1))
    torch.testing.assert_close(own.embed(ids, mask)[0], own.text_encoder(ids, mask).global_)
    assert not torch.allclose(code.embed(ids, mask)[0], mean.embed(ids, mask)[0])


def test_directions_are_a_switch() -> None:
    both, one = build()(batch())[0], build(directions="one")(batch())[0]
    for name in ("real_word", "real_sentence", "fake_word", "image"):
        assert both[name].item() > one[name].item() + 0.1


def test_generate() -> None:
    system, given = build(), batch()
    ids, mask = given["input_ids"], given["attention_mask"]
    system.train()
    first = system.generate(ids, mask, seed=3)
    assert first.shape == (4, 3, 32, 32) and not first.requires_grad
    assert torch.equal(first, system.generate(ids, mask, seed=3))
    assert not torch.equal(first, system.generate(ids, mask, seed=4))
    # in evaluation mode pictures do not depend on their neighbours
    noise = given["noise"]
    alone, together = (system.generate(ids[:n], mask[:n], noise=noise[:n]) for n in (1, 4))
    torch.testing.assert_close(alone[0], together[0])
    assert system.generator.training
    with torch.no_grad():
        system.generator.pixels.weight += 1
    assert torch.equal(first, system.generate(ids, mask, seed=3))
    assert not torch.equal(first, system.generate(ids, mask, seed=3, averaged=False))
    with pytest.raises(ValueError, match=r"noise: expected \[4, 6\], got \[4, 5\]"):
        system.generate(ids, mask, noise=torch.zeros(4, 5))
    with pytest.raises(ValueError, match="noise, seed: give one of them"):
        system.generate(ids, mask, noise=given["noise"], seed=1)


def test_save_and_load(tmp_path: Path) -> None:
    system = build(image_encoder=ImageEncoder(VIT), losses={"sentence": 0.5, "image": 2.0}, directions="one")
    system.save_pretrained(tmp_path)
    loaded = load_system(tmp_path)
    assert isinstance(loaded, XMCGAN) and loaded.to_config() == system.to_config()
    given = batch()
    pictures = [s.generate(given["input_ids"], given["attention_mask"], seed=0) for s in (system, loaded)]
    assert torch.equal(*pictures)
    system.eval()
    for name in ("encode_image", "encode_text"):
        given_to = (given["pixel_values"],) if name == "encode_image" else (given["input_ids"],)
        with torch.no_grad():
            torch.testing.assert_close(
                getattr(system, name)(*given_to).global_, getattr(loaded, name)(*given_to).global_
            )


def steps(system: XMCGAN, count: int) -> list[float]:
    networks = [system.discriminator, system.generator]
    optimizers = [torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for network in networks]
    specs = system.optimization()
    found = []
    for step in range(count):
        for turn in system.turns(batch(8, seed=step)):
            losses, _ = system(turn.batch)
            for place in turn.optimizers:
                names = specs[place].losses
                assert names is not None
                loss = torch.stack([losses[name] for name in names]).sum()
                grads = torch.autograd.grad(loss, list(networks[place].parameters()), retain_graph=True)
                for parameter, grad in zip(networks[place].parameters(), grads, strict=True):
                    parameter.grad = grad
                found.append(loss.item())
            for place in turn.optimizers:
                optimizers[place].step()
            system.after_turn(turn)
    return found


def test_fused_and_reference_train_alike() -> None:
    fused, reference = (
        XMCGAN(
            Generator(32, text_dim=16, width=4, noise_dim=6, condition_dim=5, backend=backend),
            Discriminator(32, text_dim=16, width=4),
            TextEncoder(BERT),
            backend=backend,
        )
        for backend in ("auto", "reference")
    )
    reference.load_state_dict(fused.state_dict())
    torch.testing.assert_close(
        torch.tensor(steps(fused, 20)), torch.tensor(steps(reference, 20)), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {"words": 1.0}}, "losses: expected some of sentence, word, image, image_pretrained, got words"),
        ({"losses": {"word": -1.0}}, "losses: expected weights of 0 or more"),
        ({"losses": {"image_pretrained": 1.0}}, "losses: 'image_pretrained' needs an image_encoder"),
        ({"directions": "two"}, "directions: expected 'both' or 'one', got 'two'"),
        ({"sentence_pooling": "max"}, "sentence_pooling: expected one of code, mean, encoder, got 'max'"),
        ({"gradient_penalty": -1.0}, "gradient_penalty: expected 0 or more, got -1.0"),
        ({"discriminator_lr_factor": 0.0}, "discriminator_lr_factor: expected a positive number, got 0.0"),
        ({"discriminator_steps": 0}, "discriminator_steps: expected at least 1, got 0"),
        ({"average_decay": 1.0}, r"average_decay: expected a value in \[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature, word_scale: expected positive numbers, got 0.0"),
    ],
)  # fmt: skip
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_parts_must_fit() -> None:
    generator, text = Generator(32, text_dim=16, width=4), TextEncoder(BERT)
    with pytest.raises(ValueError, match="discriminator: expected the generator's image_size 32, got 64"):
        XMCGAN(generator, Discriminator(64, text_dim=16, width=4), text)
    with pytest.raises(ValueError, match="generator: expected text_dim 16, the text encoder's width, got 12"):
        XMCGAN(Generator(32, text_dim=12, width=4), Discriminator(32, text_dim=12, width=4), text)
    with pytest.raises(TypeError, match="generator: expected Generator, got Discriminator"):
        XMCGAN(Discriminator(32, text_dim=16, width=4), generator, text)
    system, given = build(), batch()
    with pytest.raises(ValueError, match="batch: expected a text a picture, got 4 and 3"):
        system({**given, "pixel_values": given["pixel_values"][:3]})


class TestGradientPenalty:
    """R1 is differentiated twice, through the discriminator's logit alone; the ops of the contrastive losses refuse that."""

    def test_by_finite_differences(self) -> None:
        system = build(gradient_penalty=2.0).double().eval()
        given = {name: v.double() if v.is_floating_point() else v for name, v in batch(3).items()}
        real, (sentence, _, _) = given["pixel_values"], system.embed(given["input_ids"])

        def logit(pictures: Tensor) -> Tensor:
            return system.discriminator(pictures, sentence).logits.sum()

        direction = torch.randn_like(real)
        (gradient,) = torch.autograd.grad(logit(real.requires_grad_()), real)
        step = 1e-6
        numeric = (logit(real + step * direction) - logit(real - step * direction)) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), numeric.detach(), rtol=1e-5, atol=1e-7)

        class Penalty(torch.nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                name = "logit.parametrizations.weight.original"
                pictures = real.detach().requires_grad_()
                judged = torch.func.functional_call(
                    system.discriminator, {name: weight}, (pictures, sentence)
                )
                (found,) = torch.autograd.grad(judged.logits.sum(), pictures, create_graph=True)
                return found.square().sum(dim=(1, 2, 3)).mean()

        weight = system.discriminator.logit.parametrizations.weight.original
        assert torch.autograd.gradcheck(Penalty(), (weight.detach().clone().requires_grad_(),))

    def test_loss_and_whom_it_moves(self) -> None:
        plain, penalised = build(), build(gradient_penalty=3.0)
        without, _ = plain(batch())
        losses, _ = penalised(batch())
        assert "gradient_penalty" not in without
        assert penalised.optimization()[0].losses == (
            "hinge_discriminator", "gradient_penalty", "real_sentence", "real_word"
        )  # fmt: skip
        twice, _ = build(gradient_penalty=6.0)(batch())
        torch.testing.assert_close(twice["gradient_penalty"], 2 * losses["gradient_penalty"])
        losses["gradient_penalty"].backward()
        moved = {name for name, p in penalised.named_parameters() if p.grad is not None and p.grad.any()}
        assert "discriminator.blocks.0.conv_in.parametrizations.weight.original" in moved
        assert all(name.startswith("discriminator.") for name in moved)
        with torch.no_grad():
            assert "gradient_penalty" not in penalised(batch())[0]

    def test_falls_in_training(self) -> None:
        """Minimised alone it goes down, by the gradients that the second derivative gives."""
        system, given = build(gradient_penalty=1.0), batch(8)
        optimizer = torch.optim.Adam(system.discriminator.parameters(), lr=1e-2)
        seen = []
        for _ in range(15):
            loss = system(given)[0]["gradient_penalty"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        assert seen[-1] < 0.2 * seen[0]

    def test_contrastive_losses_refuse(self) -> None:
        x = torch.randn(4, 5, requires_grad=True)
        regions = torch.randn(4, 6, 5, requires_grad=True)
        for loss, leaf in (
            (pair_contrastive(x, torch.randn(4, 5))[0], x),
            (word_contrastive(regions, torch.randn(4, 3, 5))[0], regions),
        ):
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(NotImplementedError, match="its fused backward has no derivative"):
                gradient.square().sum().backward()
