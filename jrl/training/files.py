"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(name: str, path: str | Path) -> Path:
    """A path that is a folder or nothing yet.

    Args:
        name: of the option.
        path: its value.

    Raises:
        NotADirectoryError: it is a file.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise NotADirectoryError(f"{name}: {path} is a file, expected a folder")
    return Path(path)


def check_file(name: str, path: str | Path) -> Path:
    """A path that is a file or nothing yet.

    Args:
        name: of the option.
        path: its value.

    Raises:
        IsADirectoryError: it is a folder.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{name}: {path} is a folder, expected a file")
    return Path(path)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file aside, flush it to the disk and rename it into place.

    Args:
        path: where to; missing folders are made.
        data: the whole content.

    Raises:
        OSError: it cannot be written (a full disk, no permission); what was at `path` is still there.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)
