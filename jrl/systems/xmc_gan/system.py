"""XMC-GAN: cross-modal contrastive learning for text-to-image generation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.encoders import EncoderOutput, ImageEncoder, TextEncoder
from jrl.objectives.generation import (
    hinge_discriminator,
    hinge_generator,
    pair_contrastive,
    squared_gradient,
    word_contrastive,
)
from jrl.systems.base import OptimizerSpec, System, Turn
from jrl.systems.xmc_gan.checks import CONTRASTIVE, check_options, check_parts
from jrl.systems.xmc_gan.networks import Discriminator, Generator, Judgement
from jrl.systems.xmc_gan.pretrained import FrozenNetwork, pretrained_vectors


class XMCGAN(System):
    """Text to image in one stage, adversarial and contrastive.

        L_D = hinge + λ_s L_sentence(x, s) + λ_w L_word(x, s)
        L_G = -mean D(x̃, s) + λ_s L_sentence(x̃, s) + λ_w L_word(x̃, s) + λ_i L_image(x, x̃) + λ_p L_pretrained(x, x̃)

    of real pictures x, their texts s and generated pictures x̃ = G(z, s). Zhang et al. 2021; US 2023/0081171. The discriminator
    learns its contrastive features from real pairs alone. A batch is cut into `discriminator_steps` parts: the discriminator
    steps on each, and on the last the generator steps too, on the gradients of the same pass. Generated pictures come from a
    moving average of the generator.

    Where patent and code differ (the code is the default): `directions` "one" and the generator's `first_input`
    "noise_and_text" are the patent's; a `word_scale` of 1 / temperature and `sentence_pooling` "mean" are the paper's formulas.

    Args:
        generator, discriminator: of the same picture size and text width.
        text_encoder: gives words and, with pooling "encoder", sentences; it stays as it is.
        image_encoder: for the loss "image_pretrained": its vectors are compared; it stays as it is. An `ImageEncoder` is saved
            with the system; any other network from pictures to vectors [B, F] serves the training alone (`FrozenNetwork`).
        image_encoder_size: of the pictures that it gets; when None its own, or 224 where it says none.
        losses: weights of "sentence", "word", "image" and "image_pretrained"; a name that is missing weighs 0. None: 1 each,
            "image_pretrained" only with an image_encoder.
        temperature: τ of the sentence and image losses.
        word_scale: factor of the word scores.
        directions: "both" directions of the contrastive losses, added, or "one" (each picture among the texts, each real
            picture among the generated ones).
        sentence_pooling: "code" (sum over all places, padding included, over the number of real ones; texts are then padded to
            one length), "mean" over the real ones, or "encoder" (the text encoder's own vector).
        discriminator_steps: steps of the discriminator for one of the generator.
        discriminator_lr_factor: its learning rate as a multiple of the generator's.
        gradient_penalty: γ of R1, γ/2 · mean of |dD(x, s)/dx|² at the real pictures (Mescheder et al. 2018), which XMC-GAN does
            without; it costs one more pass of them.
        average_decay: of the generator's moving average.
        image_mean, image_std: what the image encoder expects its pictures to be normalised with.
        backend: of the contrastive ops.

    Raises:
        TypeError: a part is of another type.
        ValueError: parts do not fit each other, an unknown loss or option, a negative weight.
    """

    normalization = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    """Mean and deviation that pictures are normalised with: they stay in [0, 1], as the generated ones."""

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        text_encoder: TextEncoder,
        *,
        image_encoder: nn.Module | None = None,
        image_encoder_size: int | None = None,
        losses: Mapping[str, float] | None = None,
        temperature: float = 0.1,
        word_scale: float = 50.0,
        directions: str = "both",
        sentence_pooling: str = "code",
        discriminator_steps: int = 2,
        discriminator_lr_factor: float = 4.0,
        gradient_penalty: float = 0.0,
        average_decay: float = 0.999,
        image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        image_std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        backend: str = "auto",
    ) -> None:
        super().__init__()
        losses = check_parts(generator, discriminator, text_encoder, image_encoder, losses)
        check_options(
            directions=directions,
            sentence_pooling=sentence_pooling,
            discriminator_steps=discriminator_steps,
            discriminator_lr_factor=discriminator_lr_factor,
            gradient_penalty=gradient_penalty,
            average_decay=average_decay,
            temperature=temperature,
            word_scale=word_scale,
            image_encoder_size=image_encoder_size,
        )
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(generator).requires_grad_(False).eval()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.image_encoder: ImageEncoder | FrozenNetwork | None
        if image_encoder is None or isinstance(image_encoder, ImageEncoder):
            self.image_encoder = None if image_encoder is None else image_encoder.requires_grad_(False).eval()
        else:
            self.image_encoder = FrozenNetwork(image_encoder)
        self.image_encoder_size = image_encoder_size
        self.weights = {name: float(losses.get(name, 0.0)) for name in CONTRASTIVE}
        self.temperature, self.word_scale = temperature, word_scale
        self.directions, self.sentence_pooling = directions, sentence_pooling
        self.discriminator_steps, self.average_decay = discriminator_steps, average_decay
        self.discriminator_lr_factor, self.gradient_penalty = discriminator_lr_factor, gradient_penalty
        self.image_mean, self.image_std, self.backend = tuple(image_mean), tuple(image_std), backend

    @property
    def counts_padding(self) -> bool:
        """Whether a sentence depends on how far its text is padded."""
        return self.sentence_pooling == "code"

    def train(self, mode: bool = True) -> XMCGAN:
        """Training mode of the two networks; encoders and averaged weights stay in evaluation mode."""
        super().train(mode)
        for part in (self.average, self.text_encoder, self.image_encoder):
            if isinstance(part, nn.Module):
                part.eval()
        return self

    @torch.no_grad()
    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Texts [B, T] to sentences [B, E], words [B, T, E] and their mask [B, T]."""
        return self._sentences(self.text_encoder(input_ids, attention_mask))

    def _sentences(self, encoded: EncoderOutput) -> tuple[Tensor, Tensor, Tensor]:
        words = encoded.tokens
        mask = words.new_ones(words.shape[:2], dtype=torch.bool) if encoded.mask is None else encoded.mask
        if self.sentence_pooling == "encoder":
            return encoded.global_, words, mask
        counted = words if self.sentence_pooling == "code" else words * mask[:, :, None]
        return counted.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1), words, mask

    def _embed_batch(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """What the batch's texts are, by the encoder, or as embedded before."""
        mask = batch.get("attention_mask")
        if "word_features" not in batch:
            return self.embed(batch["input_ids"], mask)
        mask = None if mask is None else mask.bool()
        return self._sentences(EncoderOutput(batch["text_features"], batch["word_features"], mask))

    def encode_image(self, pixel_values: Tensor) -> EncoderOutput:
        """Pictures [B, 3, H, W] in [0, 1] to the discriminator's unit vectors [B, F], with its regions [B, R, E]."""
        nothing = pixel_values.new_zeros(len(pixel_values), self.discriminator.config["text_dim"])
        judged = self.discriminator(pixel_values, nothing)
        return EncoderOutput(F.normalize(judged.image, dim=-1), judged.regions)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """Texts [C, T] to the discriminator's unit vectors [C, F], with the text encoder's words [C, T, E]."""
        sentence, words, mask = self.embed(input_ids, attention_mask)
        return EncoderOutput(F.normalize(self.discriminator.sentence(sentence), dim=-1), words, mask)

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of both networks.

        Args:
            batch: `pixel_values` [B, 3, H, W] in [0, 1]; `input_ids` and `attention_mask` [B, T], text i of picture i; optionally
                `noise` [B, noise_dim], and what the text encoder says of the texts: `word_features` [B, T, E] and
                `text_features` [B, E].

        Returns:
            Of the discriminator "hinge_discriminator", "gradient_penalty", "real_sentence", "real_word"; of the generator
            "hinge_generator", "fake_sentence", "fake_word", "image", "image_pretrained", all weighted; those of weight 0 are
            left out, and the generator's where only the discriminator trains. Statistics: contrastive accuracies, mean logits,
            and how much the generated and the real pictures differ among themselves.

        Raises:
            ValueError: pictures of another size than the generator's, or not as many texts as pictures.
        """
        real, size = batch["pixel_values"], self.generator.config["image_size"]
        if real.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values: expected [B, 3, {size}, {size}], got {list(real.shape)}")
        sentence, words, mask = self._embed_batch(batch)
        if len(real) != len(sentence):
            raise ValueError(f"batch: expected a text a picture, got {len(sentence)} and {len(real)}")
        noise = batch.get("noise")
        if noise is None:
            noise = torch.randn(len(real), self.generator.noise_dim, device=real.device, dtype=real.dtype)
        fake = self.generator(noise, sentence, words, mask)
        judged = self.discriminator(torch.cat([real, fake.to(real.dtype)]), sentence.repeat(2, 1))
        ours, theirs = judged.halves()
        losses = {"hinge_discriminator": hinge_discriminator(ours.logits.float(), theirs.logits.float())}
        plots = {
            "logit_real": ours.logits.detach().float().mean(),
            "logit_fake": theirs.logits.detach().float().mean(),
            "spread": _spread(fake.detach()),
            "spread_real": _spread(real),
        }
        if self.gradient_penalty and torch.is_grad_enabled():
            squared = squared_gradient(lambda x: self.discriminator(x, sentence.float()).logits, real)
            losses["gradient_penalty"] = self.gradient_penalty / 2 * squared
        self._add_texts("real", ours, words, mask, losses, plots)
        if fake.requires_grad or not torch.is_grad_enabled():
            losses["hinge_generator"] = hinge_generator(theirs.logits.float())
            self._add_texts("fake", theirs, words, mask, losses, plots)
            if self.weights["image"]:
                self._add("image", "image", self._images(ours.image, theirs.image), losses, plots)
            if self.weights["image_pretrained"]:
                vectors = self._pretrained(real), self._pretrained(fake)
                self._add("image_pretrained", "image_pretrained", self._images(*vectors), losses, plots)
        return losses, plots

    def optimization(self) -> list[OptimizerSpec]:
        """The discriminator's, at its own learning rate, and the generator's; neither decays its weights."""
        texts = [name for name in ("sentence", "word") if self.weights[name]]
        images = [name for name in ("image", "image_pretrained") if self.weights[name]]
        penalty = ["gradient_penalty"] if self.gradient_penalty else []
        return [
            OptimizerSpec(
                self.discriminator.parameters(),
                ("hinge_discriminator", *penalty, *(f"real_{name}" for name in texts)),
                lr_factor=self.discriminator_lr_factor,
                weight_decay=0.0,
            ),
            OptimizerSpec(
                self.generator.parameters(),
                ("hinge_generator", *(f"fake_{name}" for name in texts), *images),
                weight_decay=0.0,
            ),
        ]

    def turns(self, batch: dict[str, Any]) -> list[Turn]:
        """A part of the batch for each step of the discriminator; the generator shares the pass of the last.

        Raises:
            ValueError: the batch has fewer pairs than the discriminator has steps.
        """
        pairs, parts = len(batch["pixel_values"]), self.discriminator_steps
        if pairs < parts:
            raise ValueError(f"batch: expected at least {parts} pairs, one a step, got {pairs}")
        edges = [pairs * place // parts for place in range(parts + 1)]
        names = ("pixel_values", "input_ids", "attention_mask", "noise", "word_features", "text_features")
        cut = [
            {name: batch[name][start:end] for name in names if name in batch}
            for start, end in pairwise(edges)
        ]
        return [Turn(part, (0,)) for part in cut[:-1]] + [Turn(cut[-1], (0, 1))]

    @property
    def steps_per_batch(self) -> int:
        """Those of the discriminator and one of the generator."""
        return self.discriminator_steps + 1

    @torch.no_grad()
    def after_turn(self, turn: Turn) -> None:
        """Move the average towards the generator: weights by the decay, running statistics at once."""
        if 1 not in turn.optimizers:
            return
        for ours, theirs in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            ours.lerp_(theirs.to(ours.dtype), 1 - self.average_decay)
        for kept, latest in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            kept.copy_(latest)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        seed: int | None = None,
        averaged: bool = True,
    ) -> Tensor:
        """Pictures of texts, by the averaged generator in evaluation mode.

        Args:
            input_ids, attention_mask: [B, T].
            noise: [B, noise_dim]; drawn when None.
            seed: of the noise, the same on every device; when None torch's own generator draws it, and so advances.
            averaged: use the moving average of the weights.

        Returns:
            [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: noise of another shape, or both noise and seed.
        """
        sentence, words, mask = self.embed(input_ids, attention_mask)
        shape = len(sentence), self.generator.noise_dim
        if noise is not None and seed is not None:
            raise ValueError("noise, seed: give one of them")
        if noise is None:
            source = None if seed is None else torch.Generator().manual_seed(seed)
            noise = torch.randn(shape, generator=source).to(sentence)
        if noise.shape != shape:
            raise ValueError(f"noise: expected {list(shape)}, got {list(noise.shape)}")
        network = self.average if averaged else self.generator
        was_training = network.training
        network.eval()
        try:
            return network(noise, sentence, words, mask)
        finally:
            network.train(was_training)

    def to_config(self) -> dict[str, Any]:
        """Arguments of `from_config`, in JSON types, without a network that is no `ImageEncoder` and the loss that needs it."""
        image = self.image_encoder.to_config() if isinstance(self.image_encoder, ImageEncoder) else None
        return {
            "generator": self.generator.config,
            "discriminator": self.discriminator.config,
            "text_encoder": self.text_encoder.to_config(),
            "image_encoder": image,
            "image_encoder_size": self.image_encoder_size,
            "losses": {
                name: weight
                for name, weight in self.weights.items()
                if weight and (image is not None or name != "image_pretrained")
            },
            "temperature": self.temperature,
            "word_scale": self.word_scale,
            "directions": self.directions,
            "sentence_pooling": self.sentence_pooling,
            "discriminator_steps": self.discriminator_steps,
            "discriminator_lr_factor": self.discriminator_lr_factor,
            "gradient_penalty": self.gradient_penalty,
            "average_decay": self.average_decay,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "backend": self.backend,
        }

    @classmethod
    def _assemble(cls, config: dict[str, Any]) -> XMCGAN:
        generator = Generator(**config.pop("generator"))
        discriminator = Discriminator(**config.pop("discriminator"))
        text_encoder = TextEncoder(**config.pop("text_encoder"))
        image = config.pop("image_encoder", None)
        image_encoder = None if image is None else ImageEncoder(**image)
        return cls(generator, discriminator, text_encoder, image_encoder=image_encoder, **config)

    def _pairs(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return pair_contrastive(
            x, y, temperature=self.temperature, directions=self.directions, backend=self.backend
        )

    def _images(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # both directions added are the same either way round, but for rounding: in this order recorded runs repeat to the bit
        return self._pairs(real, fake) if self.directions == "one" else self._pairs(fake, real)

    def _add_texts(
        self,
        which: str,
        judged: Judgement,
        words: Tensor,
        mask: Tensor,
        losses: dict[str, Tensor],
        plots: dict[str, Tensor],
    ) -> None:
        if self.weights["sentence"]:
            found = self._pairs(judged.image, judged.sentence)
            self._add(f"{which}_sentence", "sentence", found, losses, plots)
        if self.weights["word"]:
            found = word_contrastive(
                judged.regions,
                words.to(judged.regions.dtype),
                mask,
                scale=self.word_scale,
                directions=self.directions,
                backend=self.backend,
            )
            self._add(f"{which}_word", "word", found, losses, plots)

    def _add(
        self,
        name: str,
        weight: str,
        found: tuple[Tensor, dict[str, Tensor]],
        losses: dict[str, Tensor],
        plots: dict[str, Tensor],
    ) -> None:
        loss, stats = found
        losses[name] = self.weights[weight] * loss
        plots.update({f"{kind}_{name}": value for kind, value in stats.items()})

    def _pretrained(self, pictures: Tensor) -> Tensor:
        assert self.image_encoder is not None
        return pretrained_vectors(
            self.image_encoder, pictures, self.image_encoder_size, self.image_mean, self.image_std
        )


def _spread(pictures: Tensor) -> Tensor:
    """How much pictures [B, 3, H, W] differ: their standard deviation over the batch, averaged over places and channels."""
    return pictures.float().std(dim=0, correction=0).mean()
