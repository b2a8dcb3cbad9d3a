"""Zero-shot classification, for every system whose pictures and texts are unit vectors at one temperature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.objectives import ContrastiveObjective
from jrl.systems.base import System


class ZeroShotSystem(System):
    """Classifies pictures by the texts of class names; `encode_image` and `encode_text` give unit vectors.

    Attributes:
        objective: whose scale is the inverse temperature.
        projection_dim: D of the vectors.
    """

    objective: ContrastiveObjective
    projection_dim: int

    @torch.no_grad()
    def zero_shot_classifier(
        self, class_names: Sequence[str], templates: Sequence[str], tokenizer: Callable[..., Any]
    ) -> Tensor:
        """One unit vector a class: l2 of the mean over the templates of l2(text).

        Args:
            class_names: names of the classes.
            templates: prompts with "{}" where the name goes, such as "a photo of a {}".
            tokenizer: a transformers tokenizer.

        Returns:
            [classes, D].

        Raises:
            ValueError: no class, no template, or a template without "{}".
        """
        if not class_names:
            raise ValueError("class_names: expected at least one name")
        if not templates:
            raise ValueError("templates: expected at least one template")
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"templates: expected '{{}}' where the name goes, got {template!r}")
        device = next(self.parameters()).device
        vectors = []
        with self._evaluating():
            for name in class_names:
                prompts = [template.replace("{}", name) for template in templates]
                tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
                encoded = self.encode_text(
                    tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
                )
                vectors.append(F.normalize(encoded.global_.mean(dim=0), dim=-1))
        return torch.stack(vectors)

    @torch.no_grad()
    def classify(self, pixel_values: Tensor, classifier: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k likeliest classes of each picture.

        Args:
            pixel_values: [B, 3, H, W].
            classifier: [classes, D] from `zero_shot_classifier`.
            k: how many classes; at most the number there is.

        Returns:
            Probabilities [B, k] at the learned temperature, and class indices int64 [B, k], best first.

        Raises:
            ValueError: `classifier` is not [classes, D], or `k` is outside [1, classes].
        """
        if classifier.ndim != 2 or classifier.shape[1] != self.projection_dim:
            raise ValueError(
                f"classifier: expected [classes, {self.projection_dim}], got {list(classifier.shape)}"
            )
        if not 1 <= k <= classifier.shape[0]:
            raise ValueError(f"k: expected between 1 and {classifier.shape[0]} classes, got {k}")
        with self._evaluating():
            image = self.encode_image(pixel_values).global_
        probabilities = (self.objective.scale * image @ classifier.T).softmax(dim=-1)
        best = probabilities.topk(k, dim=-1)
        return best.values, best.indices

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        # module by module: a frozen part may be in evaluation while the rest trains
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
