"""One training step of CLIP and of GroupViT, fused and eager, at the sizes of a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, GroupViTConfig, GroupViTModel, ViTConfig

from jrl.encoders import ImageEncoder, TextEncoder
from jrl.objectives import ContrastiveObjective
from jrl.systems import CLIP
from jrl_kernels.integrations.transformers import apply_to_group_vit

VARIANTS = ("fused", "eager")
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


class EagerObjective(ContrastiveObjective):
    """CLIP's loss over a matrix of logits, as training scripts write it."""

    def forward(self, x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.scale * x @ y.T
        target = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, {}


class Sizes(NamedTuple):
    """Of a model on one device."""

    image: int  # pixels of a side
    length: int  # tokens of a text
    vocabulary: int
    config: dict[str, Any]
    batches: tuple[int, ...]


class Workload(NamedTuple):
    """A model whose step is measured."""

    build: Callable[[Sizes, str], nn.Module]  # sizes and variant
    loss: Callable[[nn.Module, dict[str, Tensor], bool], Tensor]  # model, batch, and whether noise is drawn
    sizes: dict[str, Sizes]


def _text(sizes: Sizes) -> dict[str, Any]:
    ids = {"bos_token_id": 0, "eos_token_id": sizes.vocabulary - 1, "pad_token_id": 1}
    return {**ids, "vocab_size": sizes.vocabulary, "max_position_embeddings": sizes.length}


def _clip(sizes: Sizes, variant: str) -> nn.Module:
    image = ViTConfig(image_size=sizes.image, **sizes.config["image"])
    text = CLIPTextConfig(**_text(sizes), **sizes.config["text"])
    system = CLIP(
        ImageEncoder(image, "cls"),
        TextEncoder(text, "eos"),
        sizes.config["projection_dim"],
        objective=ContrastiveObjective() if variant == "fused" else EagerObjective(),
    )
    if sizes.config["checkpointing"]:
        for encoder in (system.image_encoder, system.text_encoder):
            encoder.model.gradient_checkpointing_enable()
    return system


def _clip_loss(model: nn.Module, batch: dict[str, Tensor], noise: bool) -> Tensor:
    loss: Tensor = model(batch)[0]["contrastive"]
    return loss


def _group_vit(sizes: Sizes, variant: str) -> nn.Module:
    config = GroupViTConfig(
        text_config={**_text(sizes), **sizes.config.get("text", {})},
        vision_config={"image_size": sizes.image, **sizes.config.get("image", {})},
        **sizes.config.get("projection", {}),
    )
    model: nn.Module = GroupViTModel(config)
    return apply_to_group_vit(model) if variant == "fused" else model


def _group_vit_loss(model: nn.Module, batch: dict[str, Tensor], noise: bool) -> Tensor:
    # Without noise the model evaluates; the fused one is told there that nobody reads its logits.
    quiet = {} if noise or type(model) is GroupViTModel else {"output_logits": False}
    loss: Tensor = model.train(noise)(**batch, return_loss=True, **quiet).loss
    return loss


_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "CLIP": Workload(
        _clip,
        _clip_loss,
        {
            "cpu": Sizes(
                32,
                8,
                1000,
                {
                    "image": {**_SMALL, "patch_size": 16},
                    "text": _SMALL,
                    "projection_dim": 128,
                    "checkpointing": False,
                },
                (256, 1024, 4096),
            ),
            # ViT-B/32 and CLIP's text encoder; the layers' activations of 16k pairs and more fit only when recomputed.
            "cuda": Sizes(
                224,
                77,
                49408,
                {"image": {"patch_size": 32}, "text": {}, "projection_dim": 512, "checkpointing": True},
                (1024, 2048, 4096, 8192, 16384, 32768),
            ),
        },
    ),
    "GroupViT": Workload(
        _group_vit,
        _group_vit_loss,
        {
            "cpu": Sizes(
                64,
                8,
                1000,
                {
                    "image": {
                        **_SMALL,
                        "patch_size": 4,
                        "depths": [1, 1, 1],
                        "num_hidden_layers": 3,
                        "num_group_tokens": [32, 8, 0],
                        "num_output_groups": [32, 8, 0],
                    },
                    "text": _SMALL,
                    "projection": {"projection_dim": 64, "projection_intermediate_dim": 128},
                },
                (16, 32, 64),
            ),
            # The published model: transformers' defaults.
            "cuda": Sizes(224, 77, 49408, {}, (64, 128, 256, 512, 1024)),
        },
    ),
}


def make_batch(sizes: Sizes, count: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(count)
    pictures = (count, 3, sizes.image, sizes.image)
    texts = (count, sizes.length)
    ids = torch.randint(2, sizes.vocabulary - 1, texts, generator=generator, device=device)
    ids[:, -1] = sizes.vocabulary - 1
    return {
        "pixel_values": torch.randn(pictures, generator=generator, device=device, dtype=dtype),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def build(name: str, variant: str, device: str) -> nn.Module:
    """The model with the weights of one seed: those of the variants are the same."""
    workload = MODELS[name]
    torch.manual_seed(0)
    return workload.build(workload.sizes[device], variant).to(device)


class Trainer:
    """A model and its AdamW. Called with a batch, it takes one step: forward, backward, update."""

    def __init__(self, name: str, variant: str, device: str) -> None:
        self.model = build(name, variant, device).train()
        self.loss = MODELS[name].loss
        self.device = device
        # So small that hundreds of steps on one batch change no time.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        # The optimiser's state is there from its first update on.
        self(make_batch(MODELS[name].sizes[device], 2, device, DTYPES[device]))

    def __call__(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast(self.device, DTYPES[self.device], enabled=self.device == "cuda"):
            loss = self.loss(self.model, batch, True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def step(name: str, variant: str, count: int, device: str) -> Callable[[], None]:
    """A training step on one batch that is drawn here."""
    batch = make_batch(MODELS[name].sizes[device], count, device, DTYPES[device])
    return partial(Trainer(name, variant, device), batch)


def disagreement(name: str, device: str, count: int = 16) -> float:
    """How far fused is from eager in float32 without noise: relative, of the loss and of all gradients together."""
    found = {}
    for variant in VARIANTS:
        model = build(name, variant, device)
        batch = make_batch(MODELS[name].sizes[device], count, device, torch.float32)
        loss = MODELS[name].loss(model, batch, False)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[variant] = loss.detach(), torch.cat(gradients)
    errors = [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(found["fused"], found["eager"], strict=True)
    ]
    return max(errors)
