"""XMC-GAN's losses and the inputs of its generator, each by its formula, so that no option is silently left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.systems.xmc_gan import XMCGAN, Generator
from jrl.systems.xmc_gan.networks import Judgement

from .test_xmc_gan_system import batch, build


def contrasted(scores: Tensor, directions: str) -> Tensor:
    """- log softmax of the right pair, over each row, and over each column too."""
    truth = torch.arange(len(scores))
    rows = F.cross_entropy(scores, truth)
    return rows if directions == "one" else rows + F.cross_entropy(scores.mT, truth)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT


def word_scores(regions: Tensor, words: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[images, captions], one pair after the other."""
    rows = []
    for region in regions:
        row = []
        for word, real in zip(words, mask, strict=True):
            attention = (5 * cosines(word[real], region)).softmax(dim=1)
            context = attention @ F.normalize(region, dim=-1)
            row.append(scale / 5 * (5 * F.cosine_similarity(word[real], context)).logsumexp(dim=0))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def seen(system: XMCGAN, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Judgement, Judgement]:
    """The generated pictures, the words and their mask, and what the discriminator says of real and generated pictures."""
    sentence, words, mask = system.embed(given["input_ids"], given["attention_mask"].bool())
    fake = system.generator(given["noise"], sentence, words, mask)
    return fake, words, mask, *(system.discriminator(x, sentence) for x in (given["pixel_values"], fake))


@pytest.mark.parametrize("directions", ["both", "one"])
@torch.no_grad()
def test_every_contrastive_loss(directions: str) -> None:
    system, given = build(directions=directions, temperature=0.3, word_scale=7.0).eval(), batch()
    losses, _ = system(given)
    _, words, mask, real, fake = seen(system, given)
    for name, judged in (("real", real), ("fake", fake)):
        sentence = contrasted(cosines(judged.image, judged.sentence) / 0.3, directions)
        torch.testing.assert_close(losses[f"{name}_sentence"], sentence)
        word = contrasted(word_scores(judged.regions, words, mask, 7.0), directions)
        torch.testing.assert_close(losses[f"{name}_word"], word)
    # each real picture looks for its generated one among all generated
    torch.testing.assert_close(losses["image"], contrasted(cosines(real.image, fake.image) / 0.3, directions))


@torch.no_grad()
def test_the_attention_of_the_generator() -> None:
    """c_j = Σ_i softmax_i(ρ cos(w_i, h_j)) w_i / |w_i|, with the scale that was asked for."""
    torch.manual_seed(0)
    generator = Generator(32, text_dim=12, width=4, noise_dim=6, condition_dim=5, attention_scale=2.0).eval()
    kept: dict[str, Tensor] = {}
    generator.region.register_forward_hook(lambda module, given, found: kept.update(places=found))
    generator.local_blocks[0].register_forward_pre_hook(lambda module, given: kept.update(local=given[1]))
    words, mask = torch.randn(2, 5, 12), torch.arange(5) < torch.tensor([[5], [3]])
    generator(torch.randn(2, 6), torch.randn(2, 12), words, mask)
    scores = 2.0 * cosines(kept["places"].flatten(2).mT, words)
    attention = scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=2)
    expected = (attention @ F.normalize(words, dim=-1)).mT.reshape(kept["places"].shape)
    torch.testing.assert_close(kept["local"][:, :12], expected)


@pytest.mark.parametrize("first_input", ["noise", "noise_and_text"])
@torch.no_grad()
def test_what_the_first_layer_sees(first_input: str) -> None:
    torch.manual_seed(0)
    generator = Generator(32, text_dim=12, width=4, noise_dim=6, condition_dim=5, first_input=first_input)
    kept: list[Tensor] = []
    generator.start.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    noise, sentence, words = torch.randn(2, 6), torch.randn(2, 12), torch.randn(2, 5, 12)
    generator(noise, sentence, words, torch.ones(2, 5, dtype=torch.bool))
    both = torch.cat([generator.condition(sentence), noise], dim=1)
    torch.testing.assert_close(kept[0], noise if first_input == "noise" else both)


def test_the_discriminators_learning_rate() -> None:
    factors = [spec.lr_factor for spec in build(discriminator_lr_factor=3.0).optimization()]
    assert factors == [3.0, 1.0]
