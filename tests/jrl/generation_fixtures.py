"""A small system that generates, a run of it and an independent encoder, on scenes of 32 pixels."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jrl.data.images import ImageTransform
from jrl.data.sample import Sample
from jrl.data.scenes import read_scenes
from jrl.data.tokenizer import save_tokenizer, train_tokenizer
from jrl.encoders import ImageEncoder, TextEncoder
from jrl.systems import CLIP
from jrl.systems.xmc_gan import XMCGAN, Discriminator, Generator
from jrl.training.run import Run

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 300, "max_position_embeddings": 48, **SMALL}
VIT: dict[str, Any] = {"model_type": "vit", "image_size": 32, "patch_size": 8, **SMALL}


@cache
def scenes(count: int = 24) -> list[Sample]:
    return list(
        read_scenes(
            train=count, val=0, test=0, test_compositional=0, held_out=0, size=32, languages=["en"], seed=7
        )
    )


@cache
def _tokenizer() -> Any:
    texts = [caption for sample in scenes() for caption in sample.captions]
    return train_tokenizer(texts, vocabulary_size=300, max_length=48)


def generating_run(seed: int = 0, **options: Any) -> Run:
    torch.manual_seed(seed)
    system = XMCGAN(
        Generator(32, text_dim=16, width=4, noise_dim=6, condition_dim=5),
        Discriminator(32, text_dim=16, width=4),
        TextEncoder(BERT),
        **options,
    )
    return Run(system.eval(), _tokenizer(), ImageTransform(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), 48)


def encoding_run(seed: int = 1, text: TextEncoder | None = None, image: ImageEncoder | None = None) -> Run:
    torch.manual_seed(seed)
    system = CLIP(image or ImageEncoder(VIT), text or TextEncoder(BERT), projection_dim=8)
    return Run(system.eval(), _tokenizer(), ImageTransform(32), 48)


def save_run(folder: Path, run: Run, **data: Any) -> Path:
    """The run as `jrl fit` would leave it, on a few generated scenes; `data` replaces keys of its configuration."""
    model = folder / "model"
    run.system.save_pretrained(model)
    save_tokenizer(run.tokenizer, model / "tokenizer")
    transform = run.transform
    values = {
        "image_size": transform.size,
        "mean": transform.mean.flatten().tolist(),
        "std": transform.std.flatten().tolist(),
        "max_length": run.max_length,
    }
    (model / "preprocessing.json").write_text(json.dumps(values))
    options = {"train": 4, "val": 2, "test": 2, "test_compositional": 2, "size": 32, "languages": ["en"]}
    config = {"data": {"dataset": "scenes", "options": options, "image_size": 32, **data}}
    (folder / "config.yaml").write_text(json.dumps(config))  # YAML too
    return folder
