"""What the report says, as the blocks of a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jrl.demo.document import Block, Code, Heading, Paragraph, Picture, Table
from jrl.demo.questions import TEST_PARTS

TITLES = {"emoji": "CLIP on colour emoji", "scenes": "CLIP on generated scenes"}
_WAYS = {"i2t": "image → text", "t2i": "text → image"}
_METRICS = {"r1": "R@1", "r10": "R@10"}
_PARTS = {
    "emoji": (
        "**New combinations** (`test_compositional`): the thing and each of its attributes (skin tone, gender, "
        "colour, …) were seen in training, but never together. **Unseen concepts** (`test_unseen`): no picture of "
        "the thing, in any variation, was seen in training; only its words may have been, in other names."
    ),
    "scenes": (
        "**New scenes** (`test`): other arrangements of what was seen. **New combinations** "
        "(`test_compositional`): each scene shows a pair of colour and shape that no training picture has, though "
        "the colour and the shape each occur there."
    ),
}


def build(metrics: Mapping[str, Any], folder: Path) -> list[Block]:
    """The report of a demo.

    Args:
        metrics: content of `metrics.json`.
        folder: that holds the pictures.
    """
    data, found = metrics["data"], metrics["evaluation"]
    blocks: list[Block] = [Heading(TITLES[data], 1), *_opening(metrics)]
    if found["bars"]:
        blocks += _bars(found)
    else:
        blocks.append(Paragraph("The bars of this demo are stated for the emoji; none is for the scenes."))
    blocks += [Heading("Retrieval"), Paragraph(_PARTS[data]), _retrieval(data, found)]
    blocks.append(
        Paragraph(
            "Chance is the probability that a random order gets it right. The InfoNCE bound is what the embeddings "
            "are shown to share, log N minus the loss at the learned temperature, in nats; a set of N pairs "
            "cannot show more than log N, and a negative value shows nothing."
        )
    )
    blocks += _among_all(data, found)
    blocks += [
        Heading("Queries and their best pictures"),
        Paragraph(
            "The queries of the test parts were drawn at random. A green frame marks the picture that the text "
            "belongs to where it is among the first five; where it is not, its rank is given. The queries in free "
            "words have no right answer, and "
            f"search all {_count(sum(found['pictures'].values()))} pictures, those of training included."
        ),
        Picture(folder / "retrieval.png", "Queries, and the five pictures that the system finds for each"),
    ]
    if found["zero_shot"]:
        blocks += _zero_shot(found)
    blocks += [
        Heading("Training"),
        Paragraph(_training(metrics)),
        Picture(folder / "curves.png", "Loss, accuracy, InfoNCE bound and learning rate against the step"),
        *_loss_cost(metrics["loss_cost"], folder),
        Heading("Try it"),
        Code(_commands(data, folder)),
        Heading("What this was run with"),
        _setting(metrics),
        Paragraph("Pictures of the dataset that were left out, and why:"),
        Code(found["skipped"]),
    ]
    return blocks


def bar_words(bar: Mapping[str, Any]) -> str:
    """Whether a bar was met, and by how much it was missed."""
    return "met" if bar["met"] else f"missed by {100 * (bar['bar'] - bar['value']):.1f} points"


def _opening(metrics: Mapping[str, Any]) -> list[Block]:
    data, training, pictures = metrics["data"], metrics["training"], metrics["evaluation"]["pictures"]
    what = {
        "emoji": "pictures drawn from the installed Noto Color Emoji font, with the names that people gave them",
        "scenes": "generated pictures of coloured shapes, with captions from a grammar",
    }[data]
    blocks: list[Block] = [
        Paragraph(
            f"An image encoder and a text encoder, trained from scratch with CLIP's loss on "
            f"{_count(pictures['train'])} {what}. **{_duration(training['seconds'])} of training** on "
            f"{_machine(metrics)}, {training['parameters'] / 1e6:.1f} million parameters."
        )
    ]
    if metrics["why"]:
        blocks.append(Paragraph(f"**These are generated scenes, not emoji:** {metrics['why']}."))
    if metrics["changes"]:
        blocks.append(
            Paragraph(
                f"**Not the recipe of the repository:** trained with `{' '.join(metrics['changes'])}`, so the "
                "numbers are those of that change."
            )
        )
    return blocks


def _bars(found: Mapping[str, Any]) -> list[Block]:
    rows = [
        (
            bar["part"],
            _WAYS[bar["direction"]],
            f"{_METRICS[bar['metric']]} ≥ {100 * bar['bar']:.0f}%",
            _percent(bar["value"]),
            _percent(found["retrieval"][bar["part"]][f"{bar['direction']}_chance_{bar['metric']}"]),
            bar_words(bar),
        )
        for bar in found["bars"]
    ]
    headings = ("part", "direction", "bar", "reached", "chance", "")
    return [Heading("The bars"), Table(headings, rows, words=2)]


def _retrieval(data: str, found: Mapping[str, Any]) -> Table:
    rows = []
    for part, words in TEST_PARTS[data].items():
        result = found["retrieval"][part]
        for way, arrow in _WAYS.items():
            rows.append(
                (
                    f"{words} ({int(result['pictures'])})",
                    arrow,
                    *(_percent(result[f"{way}_r{k}"]) for k in (1, 5, 10)),
                    f"{result[f'{way}_median_rank']:.0f}",
                    " / ".join(_percent(result[f"{way}_chance_r{k}"]) for k in (1, 5, 10)),
                    f"{round(result['bound_nats'], 2) + 0.0:.2f} of {result['bound_ceiling']:.2f}",
                )
            )
    headings = ("part", "direction", "R@1", "R@5", "R@10", "median rank", "chance R@1 / 5 / 10", "nats")
    return Table(headings, rows, words=2)


def _among_all(data: str, found: Mapping[str, Any]) -> list[Block]:
    rows = []
    for part, words in TEST_PARTS[data].items():
        result = found["among_all"][part]
        for way, arrow in _WAYS.items():
            rows.append(
                (
                    words,
                    arrow,
                    *(_percent(result[f"{way}_r{k}"]) for k in (1, 5, 10)),
                    f"{result[f'{way}_median_rank']:.0f}",
                )
            )
    candidates = int(next(iter(found["among_all"].values()))["candidates"])
    return [
        Paragraph(
            f"Harder: the same pictures and texts, but the right one has to be found among all "
            f"{_count(candidates)} pictures of the dataset, or among all their texts; the training part, which the "
            "system knows well, is in the way."
        ),
        Table(("part", "direction", "R@1", "R@5", "R@10", "median rank"), rows, words=2),
    ]


def _zero_shot(found: Mapping[str, Any]) -> list[Block]:
    rows = [
        (
            task["task"],
            str(task["classes"]),
            str(task["pictures"]),
            _percent(task["accuracy"]),
            _percent(1 / task["classes"]),
            _percent(task["commonest"]),
        )
        for task in found["zero_shot"]
    ]
    return [
        Heading("Zero-shot classification"),
        Paragraph(
            "The test pictures that have exactly one of the classes, each put into the class whose prompts, averaged "
            f"over several templates such as `{found['zero_shot'][0]['templates'][0]}`, are nearest."
        ),
        Table(("classes", "how many", "pictures", "accuracy", "chance", "always the commonest"), rows),
    ]


def _training(metrics: Mapping[str, Any]) -> str:
    training = metrics["training"]
    pieces = training["pieces"]
    text = (
        f"{_count(training['steps'])} steps of {training['batch_size']} pairs ({training['epochs']} epochs) in "
        f"{_duration(training['seconds'])}; {_duration(training['cpu_seconds'])} of processor "
        f"time. The faint lines are single batches, the strong ones the average of five neighbours."
    )
    if pieces > 1:
        text += f" It was interrupted and resumed: the times are summed over {pieces} pieces."
    return text


def _loss_cost(cost: Mapping[str, Any], folder: Path) -> list[Block]:
    rows = []
    for row in cost["rows"]:
        fused, eager = row["fused"], row["eager"]
        told = fused["extra_bytes"] is not None and eager["extra_bytes"] is not None
        rows.append(
            (
                _count(row["batch"]),
                f"{1e3 * fused['seconds']:.1f} ms",
                f"{1e3 * eager['seconds']:.1f} ms",
                f"{eager['seconds'] / fused['seconds']:.2f}×",
                f"{fused['extra_bytes'] / 2**20:.1f} MiB" if told else "not told",
                f"{eager['extra_bytes'] / 2**20:.1f} MiB" if told else "not told",
                f"{eager['extra_bytes'] / fused['extra_bytes']:.1f}×"
                if told and fused["extra_bytes"]
                else "–",
            )
        )
    blocks: list[Block] = [
        Heading("What the loss costs"),
        Paragraph(
            f"Forward and backward of the fused loss (`jrl_kernels.info_nce`, backend `{cost['backend']}`) beside the "
            f"eager one, which stores the N×N logits and takes two cross-entropies, on {cost['width']}-dimensional "
            f"{cost['dtype']} embeddings. Time is the median of interleaved calls, memory the peak beyond what was "
            "held before the call."
        ),
    ]
    if cost["reference_because"]:
        blocks.append(
            Paragraph(
                f"**No fused kernel ran here** ({cost['reference_because']}): both columns are plain PyTorch. "
                "`python -m jrl_kernels.info` says what would help."
            )
        )
    headings = ("pairs", "time, fused", "eager", "ratio", "memory, fused", "eager", "ratio")
    if rows:
        blocks += [
            Picture(folder / "loss_cost.png", "Time and peak memory of the fused and the eager loss"),
            Table(headings, rows, words=0),
        ]
    blocks += [
        Paragraph(f"A batch of {_count(int(size))} was left out: {reason}.")
        for size, reason in cost["left_out"].items()
    ]
    return blocks


def _commands(data: str, folder: Path) -> str:
    query = {"emoji": "a red flag", "scenes": "a red circle"}[data]
    return "\n".join(
        (
            f'jrl retrieve --run {folder} "{query}"',
            f"jrl embed --run {folder} --images FOLDER --out embeddings.safetensors",
            f"tensorboard --logdir {folder}",
        )
    )


def _setting(metrics: Mapping[str, Any]) -> Table:
    versions = metrics["machine"]["versions"]
    training = metrics["training"]
    rows = [
        ("machine", _machine(metrics)),
        ("threads of PyTorch", f"{training['threads']} on {training['cores']} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("configuration", "`config.yaml`, in this folder"),
        ("weights", "`model/model.safetensors`, with its configuration and tokenizer"),
    ]
    return Table(("", ""), rows, words=2)


def _machine(metrics: Mapping[str, Any]) -> str:
    machine, training = metrics["machine"], metrics["training"]
    if not training["device"].startswith("cpu"):
        return str(machine["gpu"] or training["device"])
    threads = training["threads"]
    return f"{threads} {'thread' if threads == 1 else 'threads'} of {machine['cpu']}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _count(number: int) -> str:
    return f"{number:,}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def sections(metrics: Mapping[str, Any]) -> list[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    """The parts of the picture of queries: heading, what is searched, queries."""
    data, found = metrics["data"], metrics["evaluation"]
    result: list[tuple[str, str, Sequence[Mapping[str, Any]]]] = []
    for part, words in TEST_PARTS[data].items():
        searched = (
            f"among {int(found['retrieval'][part]['pictures'])} test pictures; green: the text's own picture"
        )
        queries = [query for query in found["queries"] if query["part"] == part]
        result.append((words.capitalize(), searched, queries))
    free = [query for query in found["queries"] if query["part"] is None]
    result.append(("Free words", f"among all {_count(sum(found['pictures'].values()))} pictures", free))
    return result
