"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


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
