"""Train open_clip's CLIP with the fused loss on pictures drawn here: no download, seconds on a CPU.

    python examples/open_clip_training.py [--steps 150] [--batch 16] [--host]

The one line is the import of ClipLoss; open_clip's own training script takes it as well.
"""

from __future__ import annotations

import torch
from open_clip import CLIP
from open_clip import ClipLoss as HostLoss
from toy import WORDS, Progress, matched, pictures, words

from jrl_kernels.integrations.open_clip import ClipLoss


def main() -> None:
    progress = Progress(__doc__, steps=150, batch=16)
    size = {"width": 64, "layers": 2}
    model = CLIP(
        embed_dim=32,
        vision_cfg={**size, "image_size": 32, "patch_size": 8, "head_width": 16},
        text_cfg={**size, "heads": 4, "context_length": 4, "vocab_size": len(WORDS)},
        output_dict=True,
    )
    loss = HostLoss() if progress.host else ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, progress.steps + 1):
        images, kinds = pictures(progress.batch)
        losses = loss(**model(images, words(kinds)), output_dict=True)
        optimizer.zero_grad()
        losses["contrastive_loss"].backward()
        optimizer.step()
        progress(step, losses["contrastive_loss"])
    images, kinds = pictures(16)
    with torch.no_grad():
        found = model.eval()(images, words(kinds))
    matched(found["image_features"] @ found["text_features"].T)


if __name__ == "__main__":
    main()
