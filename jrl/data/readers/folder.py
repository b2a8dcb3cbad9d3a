"""A plain folder of pictures, each beside a text file of the same name."""

from __future__ import annotations

import os
from pathlib import Path

from jrl.data.readers.common import (
    IMAGE_MISSING,
    IMAGE_SUFFIXES,
    NO_CAPTION,
    DistinctKeys,
    existing_folder,
    text_lines,
)
from jrl.data.sample import Sample, SampleSet, SkipReport

UNREADABLE_FOLDER = "folder that cannot be listed"


def read_folder(
    root: str | Path,
    *,
    require_captions: bool = True,
    split: str = "",
    language: str = "und",
) -> SampleSet:
    """Read `name.png` + `name.txt` pairs, in subfolders too; each line of the text is one caption.

    Hidden files and folders (a leading dot) and `__MACOSX` are left alone; links to folders are not followed.

    Args:
        root: the folder.
        require_captions: skip pictures without a caption; False keeps them, with `captions` empty.
        split: what to call the split.
        language: code of the captions' language.
    Returns:
        Samples keyed by relative name, in sorted order.
    Raises:
        FileNotFoundError, NotADirectoryError: `root` is no folder.
        ValueError: the folder holds no picture, or none with a caption when they are required.
    """
    root, skips = existing_folder(root, "root"), SkipReport()
    keys = DistinctKeys(skips)
    samples: list[Sample] = []
    pictures = 0

    def count_unreadable(error: OSError) -> None:
        skips.add(UNREADABLE_FOLDER, str(error))

    for parent, folders, files in os.walk(root, onerror=count_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        texts = {Path(name).stem: Path(parent, name) for name in files if _is(name, (".txt",))}
        images = sorted(name for name in files if _is(name, IMAGE_SUFFIXES))
        pictures += len(images)
        for stem in sorted(texts.keys() - {Path(name).stem for name in images}):
            skips.add(IMAGE_MISSING, f"{texts[stem]} has no picture beside it")
        for name in images:
            path = Path(parent, name)
            text = texts.get(path.stem)
            captions = [] if text is None else [line.strip() for _, line in text_lines(text, skips)]
            if require_captions and not captions:
                reason = "no text file" if text is None else f"{text.name} holds no caption"
                skips.add(NO_CAPTION, f"{path}: {reason}")
                continue
            key = keys(path.relative_to(root).as_posix())
            languages = [language] * len(captions)
            samples.append(Sample(key, path, captions, languages=languages, split=split))
    if pictures == 0:
        raise ValueError(f"{root}: no picture ({', '.join(IMAGE_SUFFIXES)}) in the folder; {skips.summary()}")
    skips.raise_if_empty(len(samples), root)
    return SampleSet(samples, name=root.resolve().name, skips=skips)


def _is(name: str, suffixes: tuple[str, ...]) -> bool:
    return not name.startswith(".") and name.lower().endswith(suffixes)
