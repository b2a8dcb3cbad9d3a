"""Train a transformers CLIPModel with the fused loss on pictures drawn here: no download, seconds on a CPU.

    python examples/transformers_clip.py [--steps 200] [--batch 16] [--host]

`--host` trains with transformers' own loss instead; the losses agree. To train yours, load it with `from_pretrained` and keep the
one line with `apply_to_clip`.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from jrl_kernels.integrations.transformers import ReturnLossCollator, apply_to_clip

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("square", "disc", "cross", "frame")
WORDS = ["<pad>", "<start>", *COLOURS, *SHAPES, "<end>"]


def picture(colour: str, shape: str, size: int = 32) -> Tensor:
    """[3, size, size]: a coloured shape near the middle, on noise."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    across, down = torch.randint(size // 2 - 2, size // 2 + 3, (2,))
    dx, dy = (x - across).abs(), (y - down).abs()
    inside = torch.maximum(dx, dy) <= 6
    if shape == "disc":
        inside = dx**2 + dy**2 <= 36
    elif shape == "cross":
        inside = inside & (torch.minimum(dx, dy) <= 2)
    elif shape == "frame":
        inside = inside & (torch.maximum(dx, dy) >= 4)
    image = 0.2 * torch.randn(3, size, size)
    image[:, inside] += torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None]
    return image


def pairs(count: int) -> list[dict[str, Tensor]]:
    """Pictures with their captions, every combination in turn."""
    scenes = [(c, s) for c in COLOURS for s in SHAPES]
    order = [scenes[i] for _ in range(1 + count // len(scenes)) for i in torch.randperm(len(scenes))]
    return [
        {
            "pixel_values": picture(*scene),
            "input_ids": torch.tensor([WORDS.index(word) for word in ("<start>", *scene, "<end>")]),
        }
        for scene in order[:count]
    ]


def tiny_clip() -> CLIPModel:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": len(WORDS), "max_position_embeddings": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": len(WORDS) - 1}
    config = CLIPConfig(
        text_config={**sizes, **words, **ids},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    return CLIPModel(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--host", action="store_true", help="transformers' own loss")
    given = parser.parse_args()
    if given.steps < 1 or given.batch < 2:
        parser.error("expected --steps of at least 1 and --batch of at least 2")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_clip().train()
    model.to(torch.device(device))
    if not given.host:
        apply_to_clip(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader: torch.utils.data.DataLoader[dict[str, Tensor]] = torch.utils.data.DataLoader(
        pairs(given.steps * given.batch),  # type: ignore[arg-type]
        batch_size=given.batch,
        collate_fn=ReturnLossCollator(),
    )
    start = time.perf_counter()
    for step, batch in enumerate(loader, 1):
        batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step == 1 or step % 25 == 0:
            print(f"step {step:4d}  loss {output.loss.item():.4f}  {time.perf_counter() - start:.1f} s")
    model.eval()
    batch = {name: value.to(device) for name, value in torch.utils.data.default_collate(pairs(16)).items()}
    with torch.no_grad():
        logits = model(**batch).logits_per_image
    correct = (logits.argmax(dim=1) == torch.arange(16, device=device)).float().mean()
    print(f"new pictures matched with their captions, of 16: {correct:.0%}")


if __name__ == "__main__":
    main()
