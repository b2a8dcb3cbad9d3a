from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 30),
    "blue": (30, 30, 220),
    "yellow": (230, 220, 30),
    "purple": (150, 30, 180),
    "black": (10, 10, 10),
}
SHAPES = ("circle", "square", "bar", "frame")


def draw(colour: str, shape: str, inset: int) -> Image.Image:
    picture = Image.new("RGB", (32, 32), "white")
    pen, fill = ImageDraw.Draw(picture), COLOURS[colour]
    if shape == "circle":
        pen.ellipse((inset, inset, 27, 27), fill=fill)
    elif shape == "square":
        pen.rectangle((inset, inset, 27, 27), fill=fill)
    elif shape == "bar":
        pen.rectangle((inset, 12, 27, 18), fill=fill)
    else:
        pen.rectangle((inset, inset, 27, 27), outline=fill, width=3)
    return picture


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 pictures of coloured shapes, each with its caption."""
    folder = tmp_path_factory.mktemp("pictures")
    for size, inset in (("large", 2), ("small", 12)):
        for colour in COLOURS:
            for shape in SHAPES:
                name = folder / f"{size}-{colour}-{shape}"
                draw(colour, shape, inset).save(name.with_suffix(".png"))
                name.with_suffix(".txt").write_text(f"a {size} {colour} {shape}\n", encoding="utf-8")
    return folder


@pytest.fixture
def config(pictures: Path) -> Callable[..., dict[str, Any]]:
    """The configuration of a small run on those pictures; arguments replace keys of its `trainer` and `data`."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}

    def build(trainer: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> dict[str, Any]:
        vit = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.1, **small}
        bert = {"model_type": "bert", "vocab_size": 300, "max_position_embeddings": 32, **small}
        return {
            "trainer": {
                "max_epochs": 4,
                "accelerator": "cpu",
                "devices": 1,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **(trainer or {}),
            },
            "model": {
                "lr": 2e-3,
                "system": {
                    "class_path": "jrl.systems.CLIP",
                    "init_args": {
                        "image_encoder": {
                            "class_path": "jrl.encoders.ImageEncoder",
                            "init_args": {"model": vit},
                        },
                        "text_encoder": {
                            "class_path": "jrl.encoders.TextEncoder",
                            "init_args": {"model": bert},
                        },
                        "projection_dim": 16,
                    },
                },
            },
            "data": {
                "dataset": "folder",
                "options": {"root": str(pictures)},
                "image_size": 32,
                "batch_size": 8,
                "vocab_size": 300,
                "val_fraction": 0.2,
                "augment": {"translate": 0.1, "brightness": 0.2},
                **(data or {}),
            },
        }

    return build
