"""Small GroupViT systems and batches for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jrl.encoders import TextEncoder
from jrl.encoders.group_vit import GroupViTImageEncoder
from jrl.systems import GroupViT

IMAGE: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "width": 24,
    "heads": 2,
    "depths": (1, 1, 1),
    "group_tokens": (6, 3, 0),
}
TEXT: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


def small_group_vit(image: dict[str, Any] | None = None, **options: Any) -> GroupViT:
    torch.manual_seed(0)
    encoder = GroupViTImageEncoder(**{**IMAGE, **(image or {})})
    return GroupViT(encoder, TextEncoder(TEXT, "eos"), projection_dim=16, projection_hidden=32, **options)


def perturb(module: torch.nn.Module, size: float = 0.15) -> None:
    """Move every weight off its initial value, so that no zero or one hides a mistake."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                step = size * torch.randn_like(tensor)
                tensor.add_(step.abs() if name.endswith("running_var") else step)


def sentences(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Ids that begin with 1 and end with 3, padded with 0, and their mask."""
    width = max(map(len, rows)) + 2
    ids = torch.tensor([[1, *row, 3] + [0] * (width - len(row) - 2) for row in rows])
    return ids, ids > 0


def two_halves(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures whose left and right halves have one of four colours each, and the pairs of colours [rows, 2]."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])
    pairs = torch.randint(4, (rows, 2), generator=generator)
    halves = palette[pairs]  # [rows, 2, 3]
    pixels = halves.permute(0, 2, 1)[:, :, None, :].expand(-1, -1, 16, -1).repeat_interleave(8, dim=-1)
    return pixels + 0.1 * torch.randn(rows, 3, 16, 16, generator=generator), pairs


def batch_of_halves(rows: int, seed: int) -> dict[str, Tensor]:
    """Those pictures with a caption "left right", and a prompt for each colour."""
    pixels, pairs = two_halves(rows, seed)
    ids, mask = sentences(*[[10 + a, 20, 10 + b] for a, b in pairs.tolist()])
    prompts, prompt_mask = sentences(*[[10 + colour] for colour in pairs.flatten().tolist()])
    return {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": mask,
        "prompt_ids": prompts.view(rows, 2, -1),
        "prompt_mask": prompt_mask.view(rows, 2, -1),
    }
