"""Targets, metrics and baselines of the downstream tasks, against hand-made cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jrl.data.sample import Sample, SceneObject
from jrl.data.scenes import read_scenes
from jrl.data.scenes_drawing import COLOURS, SHAPES
from jrl.downstream import (
    Captioning,
    Classification,
    Detection,
    Features,
    Segmentation,
    Task,
    VisualQuestions,
    token_map,
)
from jrl.downstream.assignment import assign
from jrl.downstream.boxes import THRESHOLDS, average_precision, box_iou
from jrl.downstream.captioning import Decoder, count_pairs
from jrl.downstream.classification import LABELS
from jrl.downstream.detection import SetHead, focal, match
from jrl.downstream.features import positions
from jrl.downstream.questions import KINDS, Question, ask
from jrl.downstream.segmentation import CLASSES, IGNORED


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return list(
        read_scenes(
            train=120, val=0, test=0, test_compositional=0, held_out=0, size=32, languages=["en"], seed=3
        )
    )


def tasks() -> list[Task]:
    return [Classification(), Segmentation(), Detection(), Captioning(), VisualQuestions()]


@given(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_the_assignment_is_the_cheapest(rows: int, more: int, seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    shape = (rows, rows + more)
    cost = generator.integers(-2, 3, shape).astype(float) if ties else generator.normal(size=shape)
    found = assign(cost)
    assert len(set(found.tolist())) == rows
    best = min(
        sum(cost[row, column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(rows + more), rows)
    )
    assert math.isclose(cost[np.arange(rows), found].sum(), best, abs_tol=1e-9)


def test_the_assignment_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="no more rows than columns"):
        assign(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="finite"):
        assign(np.array([[0.0, np.nan]]))


def test_overlap_of_boxes() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
    assert torch.allclose(box_iou(a, b), torch.tensor([[1 / 7, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    # around both: 3 · 3 with a union of 7; 2 · 2; 6 · 2 with a union of 8
    wide = torch.tensor([1 / 7 - 2 / 9, 1.0, -4 / 12])
    assert torch.allclose(box_iou(a, b, generalised=True)[0], wide)


def precision(
    scores: Sequence[float], boxes: Sequence[Sequence[float]], truths: Sequence[Sequence[float]]
) -> Tensor:
    """Average precision of one class in one picture at each overlap."""
    return average_precision(
        torch.tensor([list(scores)]),
        torch.zeros(1, len(scores), dtype=torch.int64),
        torch.tensor([[list(box) for box in boxes]]),
        torch.zeros(1, len(truths), dtype=torch.int64),
        torch.tensor([[list(box) for box in truths]]),
    )[0]


HERE, THERE, FAR = (0.0, 0.0, 1.0, 1.0), (2.0, 0.0, 3.0, 1.0), (8.0, 8.0, 9.0, 9.0)


def test_average_precision_by_hand() -> None:
    assert torch.equal(precision([0.9, 0.8], [HERE, THERE], [THERE, HERE]), torch.ones(10).double())
    # a false one in front halves the precision at every recall
    assert precision([0.9, 0.8], [FAR, HERE], [HERE])[0] == 0.5
    # behind, it costs nothing
    assert precision([0.8, 0.9], [FAR, HERE], [HERE])[0] == 1.0
    # the second box on the same object is wrong, and recall 0.5 is reached at 51 of 101 points
    assert math.isclose(precision([0.9, 0.8], [HERE, HERE], [HERE, THERE])[0], 51 / 101)
    # right, wrong, right: precision 1 up to recall 1/2 (51 points), then 2/3 (50 points)
    assert math.isclose(
        precision([0.9, 0.8, 0.7], [HERE, FAR, THERE], [HERE, THERE])[0], (51 + 50 * 2 / 3) / 101
    )
    # an overlap of 0.75 is right at the six thresholds up to 0.75
    assert precision([0.9], [(0.0, 0.0, 0.75, 1.0)], [HERE]).tolist() == [1.0] * 6 + [0.0] * 4
    assert len(THRESHOLDS) == 10 and THRESHOLDS[5] == 0.75


def test_average_precision_keeps_pictures_and_classes_apart() -> None:
    labels = torch.tensor([[0, 1], [1, -1]])
    boxes = torch.tensor([[HERE, THERE], [HERE, HERE]])
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.6]])
    assert torch.equal(average_precision(scores, labels, boxes, labels, boxes), torch.ones(2, 10).double())
    # in the first picture a wrong place, in the second the right one: precision 1/2 up to recall 1/2
    moved = boxes.flip(0)
    assert math.isclose(average_precision(scores, labels, moved, labels, boxes)[1, 0], 51 * 0.5 / 101)
    assert average_precision(scores, labels.clamp(max=0), boxes, labels, boxes)[1, 0] == 0.0
    with pytest.raises(ValueError, match="at least one object"):
        average_precision(scores, labels, boxes, torch.full_like(labels, -1), boxes)


def perfect(task: Task, values: dict[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(task, Classification):
        return {"probabilities": values["labels"]}
    if isinstance(task, Detection):
        return {
            "scores": torch.rand(values["labels"].shape),
            "labels": values["labels"],
            "boxes": values["boxes"],
        }
    return values


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_the_truth_scores_one_and_the_blind_less(task: Task, scenes: list[Sample]) -> None:
    task.prepare(scenes[:80])
    train, test = task.examples(scenes[:80]), task.examples(scenes[80:])
    assert len({len(value) for value in test.values()}) == 1
    for name, value in task.score(perfect(task, test), test).items():
        # an answer that training lacks cannot be given
        assert (
            value > 0.97 if isinstance(task, VisualQuestions) else math.isclose(value, 1.0, abs_tol=1e-6)
        ), name
    blind = task.score(task.baseline(train, test), test)
    assert blind.keys() == task.score(perfect(task, test), test).keys()
    assert 0 <= blind[task.metric] < 0.6


def test_targets_of_a_scene_made_by_hand() -> None:
    mask = np.zeros((4, 8), np.uint8)
    mask[:2, :4], mask[2:, 4:], mask[3, 0] = 1, 2, 3
    sample = Sample(
        key="hand",
        image=lambda: None,  # type: ignore[return-value]
        captions=["a small red circle and a blue star"],
        objects=[
            SceneObject("circle", ("small", "plain", "red"), (0, 0, 4, 2), 1),
            SceneObject("star", ("medium", "dotted", "blue"), (4, 2, 8, 4), 2),
            SceneObject("teapot", ("medium", "plain", "blue"), (0, 3, 1, 4), 3),
        ],
        mask=mask,
    )
    labels = Classification().examples([sample])["labels"][0]
    assert {LABELS[i] for i in labels.nonzero().flatten().tolist()} == {"circle", "star", "red", "blue"}
    classes = Segmentation().examples([sample])["mask"][0]
    assert classes[0, 0] == CLASSES.index("circle") and classes[3, 7] == CLASSES.index("star")
    assert classes[0, 7] == 0 and classes[3, 0] == IGNORED
    found = Detection().examples([sample])
    assert found["labels"][0].tolist() == [SHAPES.index("circle"), SHAPES.index("star"), -1, -1]
    assert found["boxes"][0, :2].tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    pairs = count_pairs(["a small red circle, a red circle and a blue dotted star, starred circle"])[0]
    assert pairs.sum() == pairs[list(COLOURS).index("red"), SHAPES.index("circle")] == 2


def test_ignored_pixels_and_absent_classes_leave_the_mean() -> None:
    truth = torch.tensor([[[0, 0, 1, 1], [255, 255, 255, 255]]], dtype=torch.uint8)
    said = torch.tensor([[[0, 0, 0, 1], [5, 5, 5, 5]]], dtype=torch.uint8)
    scores = Segmentation().score({"mask": said}, {"mask": truth})
    assert math.isclose(scores["mean_iou"], (2 / 3 + 1 / 2) / 2)
    assert scores["pixel_accuracy"] == 0.75


def test_questions_have_the_right_answer(scenes: list[Sample]) -> None:
    seen: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for sample in scenes:
        assert ask(sample) == ask(sample)
        things = [(next(w for w in t.attributes if w in COLOURS), t.label, t.box) for t in sample.objects]
        for question in ask(sample):
            seen[question.kind].append(question)
            words = question.text.split()
            if question.kind == "how many":
                shape = words[2].removesuffix("s") if words[2] != "crosses" else "cross"
                assert shape in SHAPES
                assert question.answer == str(sum(label == shape for _, label, _ in things))
            elif question.kind == "which colour":
                assert [colour for colour, label, _ in things if label == words[-1]] == [question.answer]
            elif question.kind == "is there":
                named = any((colour, label) == (words[-2], words[-1]) for colour, label, _ in things)
                assert question.answer == ("yes" if named else "no")
                assert words[2] == ("an" if words[-2] == "orange" else "a")
            else:
                (ground,) = [box for c, label, box in things if (c, label) == (words[-2], words[-1])]
                holds = {
                    "left": lambda a, b: a[2] <= b[0],
                    "right": lambda a, b: a[0] >= b[2],
                    "above": lambda a, b: a[3] <= b[1],
                    "below": lambda a, b: a[1] >= b[3],
                    "inside": lambda a, b: b[0] < a[0] and b[1] < a[1] and a[2] < b[2] and a[3] < b[3],
                }[words[2]]
                (only,) = [label for _, label, box in things if box != ground and holds(box, ground)]
                assert question.answer == only
    assert all(len(asked) > 30 for asked in seen.values())
    answers = [question.answer for question in seen["is there"]]
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_tokens_on_a_grid() -> None:
    tokens = torch.arange(2 * 10 * 3.0).reshape(2, 10, 3)
    laid = token_map(tokens)
    assert laid.shape == (2, 3, 3, 3)
    # the class token is left out, and the rest lie row by row
    assert torch.equal(laid[1, :, 1, 2], tokens[1, 1 + 3 + 2])
    assert torch.equal(token_map(tokens[:, 1:]), laid)
    assert token_map(torch.zeros(1, 21, 3)).shape == (1, 3, 4, 4)
    for length in (8, 0, 12):
        with pytest.raises(ValueError, match=f"got {length} tokens"):
            token_map(torch.zeros(1, length, 3))
    assert Features(torch.zeros(2, 5), tokens).rows(torch.tensor([1])).map.shape == (1, 3, 3, 3)


def test_positions_tell_every_place_apart() -> None:
    places = positions(4, 8, 32)
    assert places.shape == (32, 32)
    assert torch.cdist(places, places).fill_diagonal_(9).min() > 0.1


def test_losses_ignore_what_is_not_there() -> None:
    head = SetHead(3, len(SHAPES), 16)
    features = Features(torch.zeros(2, 4), torch.randn(2, 16, 3))
    empty = {"labels": torch.full((2, 4), -1), "boxes": torch.zeros(2, 4, 4)}
    loss = Detection().loss(head, features, empty)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)
    logits, boxes = head(features.map)
    assert [len(each) for each in match(logits.detach(), boxes.detach(), **rename(empty))] == [0, 0, 0]
    task = Segmentation()
    task.frequency = torch.full((9,), 1 / 9)
    blank = {"mask": torch.full((2, 8, 8), IGNORED, dtype=torch.uint8)}
    assert task.loss(task.head(4, 3), features, blank).item() == 0.0


def rename(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"labels": values["labels"], "true_boxes": values["boxes"]}


def test_matches_are_the_slots_that_fit() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0]]])
    labels = torch.tensor([[-1, 2, 1]])
    truth = torch.stack([torch.zeros(4), boxes[0, 2], boxes[0, 0]])[None]
    found = match(torch.zeros(1, 3, 4), boxes, labels, truth)
    assert [each.tolist() for each in found] == [[0, 0], [2, 0], [1, 2]]
    # of two slots at the same place the one that says the class
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = 3.0
    found = match(logits, boxes[:, [2, 2, 0]], labels, truth)
    assert found[1].tolist() == [1, 2]


def test_focal_loss_by_hand() -> None:
    p = torch.tensor(0.3)
    yes, no = focal(p.logit(), torch.tensor(1.0)), focal(p.logit(), torch.tensor(0.0))
    assert torch.isclose(yes, -0.25 * 0.7**2 * p.log())
    assert torch.isclose(no, -0.75 * 0.3**2 * (1 - p).log())


def test_the_decoder_never_looks_ahead_and_stops_at_the_end() -> None:
    torch.manual_seed(0)
    decoder = Decoder(3, 20, 9, width=16).eval()
    map_, ids = torch.randn(2, 3, 2, 2), torch.randint(5, 20, (2, 9))
    changed = ids.clone()
    changed[:, 5:] = 7
    assert torch.allclose(decoder(map_, ids)[:, :5], decoder(map_, changed)[:, :5], atol=1e-6)
    with torch.no_grad():
        decoder.output.bias[3] = 100.0
        assert decoder.write(map_, 2, 3).tolist() == [[2] + [3] * 8] * 2


def test_questions_do_not_read_padding(scenes: list[Sample]) -> None:
    task = VisualQuestions(16)
    task.prepare(scenes)
    head = task.head(4, 3).eval()
    values = task.examples(scenes[:4])
    map_ = torch.randn(len(values["ids"]), 3, 2, 2)
    whole = head(map_, values["ids"])
    for row, ids in enumerate(values["ids"]):
        alone = head(map_[row : row + 1], ids[ids != task.words.pad][None])
        assert torch.allclose(whole[row], alone[0], atol=1e-5)


def test_an_unknown_answer_is_wrong_and_not_learned(scenes: list[Sample]) -> None:
    task = VisualQuestions(16)
    task.prepare(scenes[:40])
    task.answers = [answer for answer in task.answers if answer != "yes"]
    values = task.examples(scenes[40:60])
    assert (values["answer"] == -1).any()
    guessed = {"answer": values["answer"].clamp(min=0)}
    assert task.score(guessed, values)["is_there"] < 1
    features = Features(torch.zeros(len(values["ids"]), 4), torch.randn(len(values["ids"]), 4, 3))
    assert torch.isfinite(task.loss(task.head(4, 3), features, values))
    none = {name: value[values["answer"] == -1] for name, value in values.items()}
    assert task.loss(task.head(4, 3), features.rows(torch.arange(len(none["ids"]))), none) == 0
