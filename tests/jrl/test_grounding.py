"""Grounding of systems whose attention is known, so that every score is; captions, tokens and files of the user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from jrl.data.images import ImageTransform
from jrl.data.sample import Phrase, Sample, SceneObject
from jrl.data.scenes import read_scenes
from jrl.data.tokenizer import train_tokenizer
from jrl.encoders import ImageEncoder, TextEncoder, WordRegions
from jrl.grounding import (
    Example,
    ProjectedTokens,
    TruePhrase,
    attend,
    ground,
    grounder,
    read_entities,
    scene_examples,
)
from jrl.grounding.evaluate import CELL, CENTRE, METRICS, SYSTEM, TWIN, UNIFORM
from jrl.grounding.report import to_json, to_markdown
from jrl.systems import CLIP
from jrl.training.run import Run

GRID, SIZE = (4, 4), 16
RED, BLUE, ALL = (4.0, 4.0, 8.0, 8.0), (8.0, 12.0, 12.0, 16.0), (0.0, 0.0, 16.0, 16.0)
RED_CELL, BLUE_CELL = 5, 14  # row by row; RED and BLUE are exactly these cells


class Told(nn.Module):
    """A system that attends as it is told: [T, R] for the tokens of a caption, whatever the picture."""

    def __init__(self, say: Callable[[Tensor], Tensor], grid: tuple[int, int] = GRID) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.say, self.grid = say, grid

    def word_regions(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> WordRegions:
        attention = torch.stack([self.say(row) for row in input_ids])
        return WordRegions(attention, self.grid, attention_mask.bool())


def cells(count: int, *chosen: int) -> Tensor:
    return torch.eye(GRID[0] * GRID[1])[list(chosen)].mean(dim=0).expand(count, -1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    samples = read_scenes(train=60, val=0, test=0, test_compositional=0, held_out=0)
    captions = [caption for sample in samples for caption in sample.captions]
    return train_tokenizer(captions, vocabulary_size=900, max_length=48)


def run_of(system: Any, tokenizer: Any, size: int = SIZE, max_length: int = 48) -> Run:
    return Run(system, tokenizer, ImageTransform(size), max_length)


def example(**changes: Any) -> Example:
    caption = "a red circle and a blue square"
    values: dict[str, Any] = {
        "name": "one",
        "image": Image.new("RGB", (SIZE, SIZE), "white"),
        "size": (SIZE, SIZE),
        "caption": caption,
        "phrases": (TruePhrase(0, 12, (RED,)), TruePhrase(17, 30, (BLUE,))),
        "candidates": (RED, BLUE, ALL),
        "anchors": False,
    }
    return Example(**{**values, **changes})


def test_every_score_of_a_known_attention(tokenizer: Any) -> None:
    names: dict[int, int] = {}
    for word, cell in (("red", RED_CELL), ("blue", BLUE_CELL)):
        (token,) = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"][1:]
        names[token] = cell

    def perfect(ids: Tensor) -> Tensor:
        rows = [cells(1, names[int(i)])[0] if int(i) in names else cells(1, *range(16))[0] for i in ids]
        return torch.stack(rows)

    found = ground(run_of(Told(perfect), tokenizer), [example()])
    assert (found.phrases, found.captions, found.candidates, found.grid) == (2, 1, 3.0, GRID)
    own = found.scores[SYSTEM]
    assert own["pointing"] == 1
    # the box is highest and tightest; by the maximum the whole picture ties with it, which holds the peak too
    assert (own["r1_mean"], own["r5_mean"]) == (1, 1)
    assert (own["r1_max"], own["r5_max"], own["r10_max"]) == (0.5, 1, 1)
    # words without a colour attend everywhere alike: 1 in the cell, 1/16 in the 15 others, spread by interpolation
    assert 0.3 < own["inside"] < 1 / (1 + 15 / 16)
    assert found.scores[UNIFORM]["pointing"] == pytest.approx(16 / 256)
    assert found.scores[UNIFORM]["inside"] == pytest.approx(16 / 256)
    # three boxes tie, one is right
    for name in ("r1_max", "r1_mean"):
        assert found.scores[UNIFORM][name] == pytest.approx(1 / 3)
    # fitted on the tested phrases: right for one of two, the first of the two cells
    assert found.cell == divmod(RED_CELL, 4)
    assert found.scores[CELL]["pointing"] == 0.5
    assert found.scores[CELL]["r1_mean"] == 0.5 and found.scores[CELL]["r1_max"] == 0.25
    # the middle is the corner of RED
    assert found.scores[CENTRE]["pointing"] == 0.25 / 2
    assert found.times_constant == 2
    assert TWIN not in found.scores


@pytest.mark.parametrize(
    ("say", "scores"),
    [
        (lambda ids: cells(len(ids), *range(16)), {"pointing": 1 / 16, "r1_max": 1 / 3, "r1_mean": 1 / 3}),
        (lambda ids: cells(len(ids), RED_CELL), {"pointing": 0.5, "r1_max": 0.25, "r1_mean": 0.5}),
        (lambda ids: cells(len(ids), 0), {"pointing": 0, "r1_max": 0, "r1_mean": 0, "r5_max": 1}),
        (lambda ids: cells(len(ids), RED_CELL, 0), {"pointing": 0.25, "r1_max": 0.25}),
    ],
    ids=["uniform", "constant", "wrong", "two peaks"],
)
def test_pointers_that_do_not_look(
    say: Callable[[Tensor], Tensor], scores: dict[str, float], tokenizer: Any
) -> None:
    found = ground(run_of(Told(say), tokenizer), [example()])
    for name, value in scores.items():
        assert found.scores[SYSTEM][name] == pytest.approx(value), name


def test_the_constant_cell_comes_from_the_training_part(tokenizer: Any) -> None:
    train = example(phrases=(TruePhrase(17, 30, (BLUE,)),))
    run = run_of(Told(lambda ids: cells(len(ids), 0)), tokenizer)
    found = ground(run, [example(), example()], train=[train])
    assert found.cell == divmod(BLUE_CELL, 4) and found.scores[CELL]["pointing"] == 0.5
    assert ground(run, [example()], train=[example()]).cell == divmod(RED_CELL, 4)


def test_several_boxes_a_mask_and_boxes_that_are_not_seen(tokenizer: Any) -> None:
    run = run_of(Told(lambda ids: cells(len(ids), BLUE_CELL)), tokenizer)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8).numpy()
    mask[12:14, 8:12] = 2
    either = (TruePhrase(0, 12, (RED, BLUE), (2,)),)
    found = ground(run, [example(phrases=either, mask=lambda: mask)])
    assert found.scores[SYSTEM]["pointing"] == 1 and found.scores[SYSTEM]["r1_mean"] == 1
    assert found.scores[UNIFORM]["inside"] == pytest.approx(8 / 256)
    assert ground(run, [example(phrases=either)]).scores[UNIFORM]["inside"] == pytest.approx(32 / 256)
    # the system sees the centre square of a wide picture: a box at its left end can neither be ranked nor pointed at
    wide = {"image": Image.new("RGB", (64, 16)), "size": (64, 16), "candidates": ((0.0, 0.0, 8.0, 8.0),)}
    lost = (TruePhrase(0, 12, ((0.0, 0.0, 8.0, 8.0),)),)
    found = ground(run, [example(**wide, phrases=lost)])
    assert found.candidates == 0 and set(found.scores[SYSTEM].values()) == {0.0}
    moved = tuple((x0 + 24, y0, x1 + 24, y1) for x0, y0, x1, y1 in (BLUE, ALL))
    seen = (TruePhrase(0, 12, moved[:1]),)
    found = ground(run, [example(**{**wide, "candidates": moved}, phrases=seen)])
    assert found.scores[SYSTEM]["pointing"] == 1 and found.scores[SYSTEM]["r1_mean"] == 1


def test_a_phrase_takes_the_tokens_of_its_words_and_no_other(tokenizer: Any) -> None:
    """Token i looks at region i alone, so the map of a phrase says which tokens it took."""
    run = run_of(Told(lambda ids: torch.eye(64)[: len(ids)], (8, 8)), tokenizer)
    samples = read_scenes(train=12, val=0, test=0, test_compositional=0, held_out=0, seed=5)
    picture, checked = Image.new("RGB", (16, 16)), 0
    for one in scene_examples(samples, 64):
        (maps,) = attend(run, run.system, [picture], [one.caption])
        ids = tokenizer(one.caption)["input_ids"]
        for phrase in one.phrases:
            taken = maps.phrase(phrase.start, phrase.end)
            assert taken is not None
            text = tokenizer.decode([ids[i] for i in taken.flatten().nonzero().flatten().tolist()])
            said = one.caption[phrase.start : phrase.end].lower()
            # a token that is a space alone belongs to no word
            assert text.replace(" ", "") == said.replace(" ", "")
            checked += 1
    assert checked > 100
    assert maps.phrase(0, 0) is None
    # white space belongs to no word
    (maps,) = attend(run, run.system, [picture], ["red  circle"])
    assert maps.phrase(3, 5) is None and maps.phrase(2, 3) is not None


def test_phrases_behind_the_cut_are_left_out_and_counted(tokenizer: Any) -> None:
    run = run_of(Told(lambda ids: cells(len(ids), RED_CELL)), tokenizer, max_length=5)
    found = ground(run, [example()])
    assert found.phrases == 1 and found.skips.skipped == 1
    assert "'a blue square'" in found.skips.summary()
    assert to_json(found)["skipped"] == {"phrase after the last token that the run takes": 1}
    with pytest.raises(ValueError, match="phrases: no usable sample"):
        ground(run, [example(phrases=example().phrases[1:])])


def test_phrases_with_the_same_words_share_their_objects() -> None:
    boxes = [(0.0, 0.0, 2.0, 2.0), (4.0, 4.0, 6.0, 6.0), (1.0, 5.0, 3.0, 7.0)]
    things = [SceneObject("circle", ("red",), box, i) for i, box in enumerate(boxes, 1)]
    caption = "a red circle, a red circle and a star"
    spans = [(0, 12), (14, 26), (31, 37)]
    phrases = [Phrase(0, *span, (i,)) for i, span in enumerate(spans)]
    sample = Sample("a", Image.new("RGB", (8, 8)), [caption, "nothing"], objects=things, phrases=phrases)
    (one,) = scene_examples([sample], 8)
    assert [phrase.boxes for phrase in one.phrases] == [tuple(boxes[:2])] * 2 + [(boxes[2],)]
    assert [phrase.mask_ids for phrase in one.phrases] == [(1, 2), (1, 2), (3,)]
    assert one.candidates == tuple(boxes) and one.mask() is None
    with pytest.raises(ValueError, match="expected captions with phrases"):
        scene_examples([Sample("a", Image.new("RGB", (8, 8)), ["nothing"])], 8)


def clip(image: str = "mean", text: str = "mean", **options: Any) -> CLIP:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return CLIP(
        ImageEncoder(
            {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, image
        )
        if image == "mean"
        else ImageEncoder({"model_type": "vit", "image_size": 32, "patch_size": 8, **small}, image),
        TextEncoder({"model_type": "bert", "vocab_size": 900, "max_position_embeddings": 64, **small}, text),
        projection_dim=16,
        **options,
    ).eval()


def test_the_cosine_of_clip_is_the_mean_over_its_words_and_regions(tokenizer: Any) -> None:
    system = clip()
    pixels = torch.randn(3, 3, 32, 32)
    texts = ["a red circle", "a blue square above a star", "one"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    words = mask.bool()
    with torch.no_grad():
        found = ProjectedTokens(system).word_regions(pixels, ids, mask)
        image, text = system.encode_image(pixels), system.encode_text(ids, mask)
        cosine = (image.global_ * text.global_).sum(dim=1)
        # the parts of the tokens, again from the encoders, in another order of operations
        x = image.tokens @ system.image_projection.output.weight.T
        y = text.tokens @ system.text_projection.output.weight.T
        y_mean = torch.stack([row[keep].mean(dim=0) for row, keep in zip(y, words, strict=True)])
        parts = y @ x.transpose(1, 2) / (x.mean(dim=1).norm(dim=1) * y_mean.norm(dim=1))[:, None, None]
    assert found.grid == (4, 4) and torch.equal(found.mask, words)
    assert torch.allclose(found.attention, parts.softmax(dim=-1), atol=1e-5)
    assert torch.allclose(found.attention.sum(dim=-1), torch.ones(ids.shape), atol=1e-5)
    for row in range(3):
        assert float(parts[row][words[row]].mean()) == pytest.approx(float(cosine[row]), abs=1e-5)


def test_systems_that_cannot_ground_are_refused(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="Linear cannot ground words: it has no word_regions"):
        grounder(nn.Linear(1, 1))
    for system in (clip(image="cls"), clip(text="cls"), clip(projection="mlp")):
        with pytest.raises(ValueError, match="only a CLIP with pooling 'mean' on both sides and linear"):
            grounder(system)
    assert isinstance(grounder(clip()), ProjectedTokens)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (lambda t: (torch.full((1, t, 16), 1 / 16), (4, 4), torch.ones(1, t)), None),
        (lambda t: (torch.full((1, t, 15), 1 / 15), (4, 4), torch.ones(1, t)), "a grid of 4x4"),
        (lambda t: (torch.full((1, t - 1, 16), 1 / 16), (4, 4), torch.ones(1, t - 1)), "expected attention"),
        (lambda t: (torch.full((1, t, 16), 1 / 16), (4, 4), torch.ones(1, t + 1)), "and a mask"),
        (lambda t: (torch.full((1, t, 16), 0.5), (4, 4), torch.ones(1, t)), "to sum to one"),
        (lambda t: (torch.full((1, t, 16), float("nan")), (4, 4), torch.ones(1, t)), "to sum to one"),
        (lambda t: (torch.full((1, t, 16), 1 / 16), (4, 4), torch.zeros(1, t)), "none is left of 'a red"),
    ],
)
def test_attention_that_does_not_fit_is_refused(
    said: Callable[[int], Any], problem: str | None, tokenizer: Any
) -> None:
    class Says(Told):
        def word_regions(
            self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
        ) -> WordRegions:
            return WordRegions(*said(input_ids.shape[1]))

    run = run_of(Says(lambda ids: ids), tokenizer)
    if problem is None:
        assert ground(run, [example()]).phrases == 2
        return
    with pytest.raises(ValueError, match=problem):
        ground(run, [example()])


def test_what_is_no_word_regions_and_blank_captions_are_refused(tokenizer: Any) -> None:
    class Tells(Told):
        def word_regions(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return torch.ones(1)

    with pytest.raises(TypeError, match="expected it to return WordRegions, got Tensor"):
        ground(run_of(Tells(lambda ids: ids), tokenizer), [example()])
    run = run_of(Told(lambda ids: cells(len(ids), 0)), tokenizer)
    with pytest.raises(ValueError, match="caption: expected words, none is left of"):
        attend(run, grounder(run.system), [Image.new("RGB", (4, 4))], [" \u3000 "])


def test_the_table(tokenizer: Any) -> None:
    found = ground(run_of(Told(lambda ids: cells(len(ids), RED_CELL)), tokenizer), [example()])
    table = to_markdown(found).splitlines()
    assert table[0] == (
        "| | pointing | inside | R@1 max | R@5 max | R@10 max | R@1 mean | R@5 mean | R@10 mean |"
    )
    assert table[2].startswith(f"| **{SYSTEM}** | **50.0** |") and len(table) == 2 + 4
    values = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert values["pointing_times_best_constant"] == 1 and values["best_constant_cell"] == [1, 1]
    assert list(values["scores"][CENTRE]) == list(METRICS)


def write_lines(folder: Path, *lines: Any) -> Path:
    path = folder / "entities.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def line(**changes: Any) -> dict[str, Any]:
    phrases = [{"start": 0, "end": 5, "boxes": [[1, 2, 11, 12.5]]}]
    return {"image": "p.png", "caption": "A dog runs.", "phrases": phrases, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 20), "white").save(tmp_path / "p.png")
    turned = Image.new("RGB", (40, 20), "white")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return tmp_path


def test_entities_are_read(folder: Path) -> None:
    none = {"start": 6, "end": 10, "boxes": []}
    two = {"start": 2, "end": 5, "boxes": [[0, 0, 10, 10], [-1, 0.5, 41, 20.7]]}
    path = write_lines(
        folder,
        line(),
        "",
        line(phrases=[none, two], anything=1),
        line(phrases=[none]),
        line(image="turned.jpg", phrases=[{"start": 0, "end": 5, "boxes": [[0, 30, 20, 40]]}]),
        line(proposals=[[0, 0, 5, 5], [1, 1, 9, 9]]),
    )
    examples, skips = read_entities(path)
    assert [one.name for one in examples] == [f"{path}:{number}" for number in (1, 3, 5, 6)]
    assert examples[0].phrases == (TruePhrase(0, 5, ((1.0, 2.0, 11.0, 12.5),)),)
    assert examples[0].size == (40, 20) and examples[2].size == (20, 40)
    # what runs over the edge by a pixel is cut off
    assert examples[1].phrases[0].boxes == ((0.0, 0.0, 10.0, 10.0), (0.0, 0.5, 40.0, 20.0))
    assert examples[0].candidates == ((1.0, 2.0, 11.0, 12.5),) and examples[0].anchors
    assert examples[3].candidates == ((0.0, 0.0, 5.0, 5.0), (1.0, 1.0, 9.0, 9.0)) and not examples[3].anchors
    assert skips.skipped == 1 and sum(skips.notes.values()) == 2
    assert f"{path}:4: 'A dog runs.'" in skips.summary() and "'runs'" in skips.summary()


def phrase(**changes: Any) -> dict[str, Any]:
    return line(phrases=[{"start": 0, "end": 5, "boxes": [[1, 2, 11, 12]], **changes}])


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", r"expected a JSON object, got list \[1\]"),
        (line(image="absent.png"), "absent.png.*no such file"),
        (
            line(image="broken.png"),
            "broken.png.*cannot decode|broken.png.*cannot open|broken.png.*not a picture",
        ),
        (line(image=None), "image: expected a text, got nothing"),
        (line(caption="  "), 'caption: expected a text, got str "  "'),
        (line(caption=3), "caption: expected a text, got int 3"),
        (line(phrases=None), "phrases: expected a list, got nothing"),
        (line(phrases=["a"]), r"phrases\[0\]: expected an object with start, end and boxes, got str"),
        (phrase(end=12), r"phrases\[0\]: expected 0 <= start < end <= 11, .* got 0 to 12"),
        (phrase(start=5), r"expected 0 <= start < end <= 11, .* got 5 to 5"),
        (phrase(start=-1), "got -1 to 5"),
        (phrase(start=1.0), r"phrases\[0\].start: expected a whole number, got float 1.0"),
        (phrase(start=True), r"phrases\[0\].start: expected a whole number, got bool"),
        (phrase(start=1, end=2), "expected words from 1 to 2, got ' '"),
        (phrase(boxes=None), r"phrases\[0\].boxes: expected a list"),
        (phrase(boxes=[[1, 2, 3]]), r"phrases\[0\].boxes\[0\]: expected four numbers"),
        (phrase(boxes=[[1, 2, 3, "4"]]), "expected four numbers"),
        (phrase(boxes=[[1, 2, 3, float("nan")]]), "expected four numbers"),
        (phrase(boxes=[[1, 2, 3, 10**400]]), "expected four numbers"),
        (phrase(boxes=[[0, 0, 42, 5]]), r"\[0, 0, 42, 5\] lies outside of the picture, which is 40x20"),
        (phrase(boxes=[[-2, 0, 4, 5]]), "lies outside of the picture"),
        (phrase(boxes=[[5, 0, 5, 5]]), "expected x0 < x1 and y0 < y1 inside the picture"),
        (phrase(boxes=[[0, 9, 5, 5]]), "expected x0 < x1 and y0 < y1"),
        (line(proposals=[]), "proposals: expected at least one box, got none"),
        (line(proposals=[[0, 0, 5, 99]]), r"proposals\[0\]: .* lies outside of the picture"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(folder: Path, bad: Any, problem: str) -> None:
    path = write_lines(folder, line(), bad)
    with pytest.raises(ValueError, match=problem) as caught:
        read_entities(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_files_that_hold_nothing(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.jsonl: no such file"):
        read_entities(folder / "absent.jsonl")
    with pytest.raises(ValueError, match="no usable sample; 1 skipped"):
        read_entities(write_lines(folder, line(phrases=[])))
    (folder / "latin.jsonl").write_bytes(json.dumps(line()).encode() + b"\n\xe9\n")
    with pytest.raises(ValueError, match=r"not UTF-8: .*latin.jsonl:2"):
        read_entities(folder / "latin.jsonl")
