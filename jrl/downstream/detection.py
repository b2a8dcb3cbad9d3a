"""Boxes around the shapes: a set of predictions matched one to one with the objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from jrl.data.sample import Sample
from jrl.data.scenes import MAX_OBJECTS
from jrl.data.scenes_drawing import SHAPES
from jrl.downstream.assignment import assign
from jrl.downstream.boxes import average_precision, box_iou
from jrl.downstream.features import Features, MapTokens
from jrl.downstream.task import Recipe, Task, Values

# weights of the classes, of the distance of the boxes and of their overlap, as in DETR
_CLASS, _DISTANCE, _OVERLAP = 2.0, 5.0, 2.0
_KEPT = 20
_FEWEST_SLOTS = 32
_DRAWN_ABOVE = 0.3


class SetHead(nn.Module):
    """Slots at the tokens, each of which says a class and a box.

    One layer of self-attention lets the slots agree on who takes which object. A box is its token's place plus an
    offset; a coarse map has several slots a token, so that there are enough of them.

    Args:
        in_channels: W of the map.
        classes: how many.
        width: of the slots.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.tokens = MapTokens(in_channels, width)
        self.kinds = nn.Parameter(torch.randn(_FEWEST_SLOTS, width))
        self.attention = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, batch_first=True, norm_first=True
        )
        self.classes = nn.Linear(width, classes)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        # nearly all slots are empty: begin there, as the focal loss asks
        nn.init.constant_(self.classes.bias, -4.0)

    def forward(self, map_: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, slots, classes] and boxes [B, slots, 4] of x0, y0, x1, y1 in [0, 1] and a little around."""
        height, width = map_.shape[2:]
        each = -(-_FEWEST_SLOTS // (height * width))
        slots = (self.tokens(map_)[:, :, None] + self.kinds[:each]).flatten(1, 2)
        slots = self.attention(slots)
        rows = (torch.arange(height, device=map_.device) + 0.5) / height
        columns = (torch.arange(width, device=map_.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).flatten(0, 1)
        places = torch.logit(grid).repeat_interleave(each, dim=0)
        raw = self.boxes(slots)
        centre = (raw[..., :2] + places).sigmoid()
        half = (raw[..., 2:] - 1.0).sigmoid() / 2
        return self.classes(slots), torch.cat([centre - half, centre + half], dim=-1)


class Detection(Task):
    """A box and a class for each shape. Focal loss, distance and overlap of matched boxes; COCO's AP."""

    name = "detection"
    metric = "ap50"
    recipe = Recipe(epochs=40, lr=2e-3)

    def __init__(self, width: int = 128) -> None:
        self.width = width

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Nothing: the classes are those of the generator."""

    def examples(self, samples: Sequence[Sample]) -> Values:
        """ "labels" [E, M] int64, −1 where there is no object, and "boxes" [E, M, 4] as shares of the picture."""
        most = max((len(sample.objects) for sample in samples), default=0)
        labels = torch.full((len(samples), max(most, MAX_OBJECTS)), -1)
        boxes = torch.zeros(*labels.shape, 4)
        for row, sample in enumerate(samples):
            mask = sample.load_mask()
            if mask is None:
                raise ValueError(f"sample {sample.key!r}: has no mask, whose size the boxes are divided by")
            size = torch.tensor([mask.shape[1], mask.shape[0]] * 2)
            known = [thing for thing in sample.objects if thing.label in SHAPES]
            for place, thing in enumerate(known):
                labels[row, place] = SHAPES.index(thing.label)
                boxes[row, place] = torch.tensor(thing.box) / size
        return {"image": torch.arange(len(samples)), "labels": labels, "boxes": boxes}

    def head(self, global_width: int, token_width: int) -> nn.Module:
        """Slots at the tokens."""
        return SetHead(token_width, len(SHAPES), self.width)

    def loss(self, head: nn.Module, features: Features, batch: Values) -> Tensor:
        """Focal loss over all slots, distance and overlap over the matched ones, for each object of the batch."""
        logits, boxes = head(features.map)
        picture, slot, thing = match(logits.detach(), boxes.detach(), batch["labels"], batch["boxes"])
        count = max(1, len(picture))
        wanted = torch.zeros_like(logits)
        wanted[picture, slot, batch["labels"][picture, thing]] = 1
        said, true = boxes[picture, slot], batch["boxes"][picture, thing]
        overlap = box_iou(said[:, None], true[:, None], generalised=True)
        return (
            _CLASS * focal(logits, wanted).sum()
            + _DISTANCE * (said - true).abs().sum()
            + _OVERLAP * (1 - overlap).sum()
        ) / count

    def predict(self, head: nn.Module, features: Features, batch: Values) -> Values:
        """ "scores" [B, K], "labels" [B, K] and "boxes" [B, K, 4] of the likeliest pairs of slot and class."""
        logits, boxes = head(features.map)
        scores, places = logits.sigmoid().flatten(1).topk(_KEPT, dim=1)
        slots, labels = places // logits.shape[2], places % logits.shape[2]
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        return {"scores": scores, "labels": labels, "boxes": boxes[rows, slots]}

    def baseline(self, train: Values, test: Values) -> Values:
        """In every picture the mean box of each class, with its frequency as the score."""
        present = train["labels"][..., None] == torch.arange(len(SHAPES))
        counts = present.sum(dim=(0, 1))
        sums = torch.einsum("nmc,nmd->cd", present.float(), train["boxes"])
        return {
            name: value.expand(len(test["labels"]), *value.shape)
            for name, value in {
                "scores": counts / len(train["labels"]),
                "labels": torch.arange(len(SHAPES)),
                "boxes": sums / counts.clamp(min=1)[:, None],
            }.items()
        }

    def score(self, predictions: Values, examples: Values) -> dict[str, float]:
        """Average precision at an overlap of 0.5, and the mean over 0.5, 0.55, …, 0.95; means over the classes."""
        found = average_precision(
            predictions["scores"],
            predictions["labels"],
            predictions["boxes"],
            examples["labels"],
            examples["boxes"],
        ).mean(dim=0)
        return {self.metric: float(found[0]), "ap": float(found.mean())}

    def draw(self, axes: Axes, picture: np.ndarray, predictions: Values, examples: Values, row: int) -> None:
        """True boxes dashed, predicted ones in blue with their class."""
        axes.imshow(picture)
        size = np.array([picture.shape[1], picture.shape[0]] * 2)

        def frame(box: Tensor, **style: object) -> tuple[float, float]:
            x0, y0, x1, y1 = (box.numpy() * size - 0.5).tolist()
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))  # type: ignore[arg-type]
            return x0, y0

        for place in (examples["labels"][row] >= 0).nonzero().flatten().tolist():
            frame(examples["boxes"][row, place], edgecolor="tab:green", linestyle="--", linewidth=2)
        for place in (predictions["scores"][row] > _DRAWN_ABOVE).nonzero().flatten().tolist():
            x0, y0 = frame(predictions["boxes"][row, place], edgecolor="tab:blue", linewidth=1)
            text = f"{SHAPES[int(predictions['labels'][row, place])]} {predictions['scores'][row, place]:.2f}"
            axes.text(x0, y0, text, fontsize=5, color="white", backgroundcolor="tab:blue", clip_on=True)
        axes.set_title("dashed: truth, blue: said", fontsize=7)


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss −α_t (1 − p_t)² log p_t with α = ¼, element by element (Lin et al. 2017)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    right = torch.where(wanted > 0, logits, -logits).sigmoid()
    return torch.where(wanted > 0, 0.25, 0.75) * (1 - right) ** 2 * cross_entropy


def match(logits: Tensor, boxes: Tensor, labels: Tensor, true_boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slots that answer for the objects: picture by picture the assignment of least cost.

    Args:
        logits: [B, slots, classes].
        boxes: [B, slots, 4].
        labels: [B, M] int64, −1 for none.
        true_boxes: [B, M, 4].

    Returns:
        Picture, slot and object of each match, int64.

    Raises:
        ValueError: more objects in a picture than slots, or a prediction that is NaN.
    """
    likely = focal(logits, torch.ones_like(logits)) - focal(logits, torch.zeros_like(logits))
    index = labels.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
    cost = _CLASS * likely.gather(2, index)
    cost = cost + _DISTANCE * torch.cdist(boxes, true_boxes, p=1)
    cost = cost - _OVERLAP * box_iou(boxes, true_boxes, generalised=True)
    costs = cost.transpose(1, 2).double().cpu().numpy()
    picture, slot, thing = [], [], []
    for row, present in enumerate((labels >= 0).cpu().numpy()):
        things = np.flatnonzero(present)
        slots = assign(costs[row, things])
        picture.append(np.full(len(things), row))
        slot.append(slots)
        thing.append(things)
    found = [np.concatenate(each) for each in (picture, slot, thing)]
    return tuple(torch.from_numpy(each).to(logits.device) for each in found)  # type: ignore[return-value]
