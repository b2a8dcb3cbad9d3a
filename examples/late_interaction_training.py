"""Patches of a picture against words of a caption by MaxSim, in late-interaction-kernels' call: seconds on a CPU.

    python examples/late_interaction_training.py [--steps 100] [--batch 16] [--host]

With --host late-interaction-kernels must be installed; its MaxSimScorer makes all similarities on a CPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from toy import WORDS, Progress, matched, pictures, words


def main() -> None:
    progress = Progress(__doc__, steps=100, batch=16)
    if progress.host:
        from late_interaction_kernels import MaxSimScorer

        score = MaxSimScorer(normalize=True)
    else:
        from jrl_kernels.integrations.late_interaction_kernels import maxsim

        score = functools.partial(maxsim, normalize=True)
    patches = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.Flatten(2))
    tokens = nn.Embedding(len(WORDS), 32)
    optimizer = torch.optim.AdamW([*patches.parameters(), *tokens.parameters()], lr=3e-3)

    def scores(images: Tensor, kinds: Tensor) -> Tensor:
        """[images, captions]: only the two words in the middle say anything."""
        ids = words(kinds)
        found: Tensor = score(tokens(ids), patches(images).mT, q_mask=(ids > 1) & (ids < len(WORDS) - 1))
        return found.T

    for step in range(1, progress.steps + 1):
        value = nn.functional.cross_entropy(
            10 * scores(*pictures(progress.batch)), torch.arange(progress.batch)
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress(step, value)
    with torch.no_grad():
        matched(scores(*pictures(16)))


if __name__ == "__main__":
    main()
