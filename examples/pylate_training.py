"""PyLate's contrastive loss over token embeddings, scored by max_sim, with a tiny BERT made here: no download.

    python examples/pylate_training.py [--steps 60] [--batch 16] [--host]

The one line is `score_metric=ColBERTScores()`. A ColBERT of PyLate's takes the place of the class below.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from pylate.losses import Contrastive
from torch import Tensor, nn
from toy import Progress, matched, sentences, tiny_bert
from transformers import AutoModel, AutoTokenizer

from jrl_kernels.integrations.pylate import ColBERTScores, colbert_scores


class TokenEncoder(nn.Module):
    """What PyLate's losses ask of a model."""

    do_query_expansion = False

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.bert, self.tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.skiplist: list[int] = []

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(texts, padding="max_length", max_length=10, return_tensors="pt"))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"token_embeddings": self.bert(**features).last_hidden_state}


def main() -> None:
    progress = Progress(__doc__, steps=60, batch=16)
    with tempfile.TemporaryDirectory() as folder:
        model = TokenEncoder(tiny_bert(Path(folder)))
    # None is PyLate's own scores
    metric: Any = None if progress.host else ColBERTScores()
    loss = Contrastive(model, score_metric=metric, temperature=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, progress.steps + 1):
        first, second = sentences(torch.randperm(16)[: progress.batch])
        value = loss([model.tokenize(first), model.tokenize(second)])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress(step, value)
    features = [model.tokenize(texts) for texts in sentences(torch.arange(16))]
    with torch.no_grad():
        x, y = (nn.functional.normalize(model.eval()(f)["token_embeddings"], dim=-1) for f in features)
    matched(colbert_scores(x, y, *(f["attention_mask"] for f in features)))


if __name__ == "__main__":
    main()
