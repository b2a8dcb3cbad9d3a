"""Running files of tests of Triton kernels in Triton's interpreter, on CPU tensors: `tests/ops/interpreted_<name>.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def groups(*names: str) -> list[str]:
    """The test classes of interpreted_<name>.py, each as `file::class`: units that may run side by side."""
    files = [ROOT / "tests" / "ops" / f"interpreted_{name}.py" for name in names]
    return [
        f"{path.relative_to(ROOT)}::{group}"
        for path in files
        for group in re.findall(r"^class (Test\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def run(group: str) -> None:
    """Run one group in a process of its own, since Triton looks at TRITON_INTERPRET when it is imported; nothing may skip."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", group],
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
