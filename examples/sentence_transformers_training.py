"""Train a tiny SentenceTransformer with the fused, cached ranking loss through its own Trainer: no download.

    python examples/sentence_transformers_training.py [--steps 60] [--batch 16] [--host]

The one line is the import of the loss.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as host
from toy import Progress, matched, sentences, tiny_bert

from jrl_kernels.integrations import sentence_transformers as fused


def main() -> None:
    progress = Progress(__doc__, steps=60, batch=16)
    module = host if progress.host else fused
    with tempfile.TemporaryDirectory() as folder:
        model = SentenceTransformer(tiny_bert(Path(folder)), device="cpu")
        anchors, positives = sentences(torch.cat([torch.randperm(16) for _ in range(progress.steps)]))
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=progress.batch,
                max_steps=progress.steps,
                learning_rate=2e-3,
                logging_steps=25,
                logging_first_step=True,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"anchor": anchors, "positive": positives}),
            loss=module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
        )
        trainer.train()
        for row in trainer.state.log_history:
            if "loss" in row:
                progress(row["step"], torch.tensor(row["loss"]))
        first, second = sentences(torch.arange(16))
        matched(model.similarity(model.encode(first), model.encode(second)))


if __name__ == "__main__":
    main()
