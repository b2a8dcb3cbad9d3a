"""Files that are the parts of one dataset, such as the training and validation files of COCO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jrl.data.sample import Sample, SampleSet, SkipReport


def read_files(reader: Callable[..., SampleSet], **arguments: Any) -> SampleSet:
    """What the reader reads; by parts (`read_parts`) where `annotations` names them, as in `{train: FILE, val: FILE}`."""
    by_parts = isinstance(arguments.get("annotations"), Mapping)
    return read_parts(reader, **arguments) if by_parts else reader(**arguments)


def read_parts(reader: Callable[..., SampleSet], **arguments: Any) -> SampleSet:
    """Read each part with its own files, and put them together; `Sample.split` is the name of the part.

    Args:
        reader: of one part; takes `annotations` and `split`.
        arguments: of the reader; `annotations` by the names of the parts, any other one for all parts or by the same names.

    Raises:
        ValueError: no part, an argument by other names, or a picture that is in two parts.
    """
    names = list(arguments["annotations"])
    if not names:
        raise ValueError("annotations: expected a file for each part, got none")
    if arguments.get("split"):
        raise ValueError(
            f"split: expected none beside the parts {', '.join(names)}, got {arguments['split']!r}"
        )
    for argument, value in arguments.items():
        if isinstance(value, Mapping) and set(value) != set(names):
            raise ValueError(
                f"{argument}: expected the parts of annotations, {', '.join(names)}, got {', '.join(value)}"
            )
    skips = SkipReport()
    samples: list[Sample] = []
    for name in names:
        own = {
            argument: value[name] if isinstance(value, Mapping) else value
            for argument, value in arguments.items()
        }
        part = reader(**{**own, "split": name})
        skips.merge(part.skips)
        samples.extend(part)
    return SampleSet(samples, name="+".join(names), skips=skips)
