"""Running files of tests of Triton kernels in Triton's interpreter, on CPU tensors: `tests/ops/interpreted_<name>.py`."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from tests.serving import Server, serve

ROOT = Path(__file__).parents[1]


def groups(*names: str) -> list[str]:
    """The test classes of interpreted_<name>.py, each as `file::class`: units that may run side by side."""
    files = [ROOT / "tests" / "ops" / f"interpreted_{name}.py" for name in names]
    return [
        f"{path.relative_to(ROOT)}::{group}"
        for path in files
        for group in re.findall(r"^class (Test\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def server() -> Server:
    """What runs groups: Triton looks at TRITON_INTERPRET when it is imported, so not the process that asks."""
    return Server("tests.interpreter", {"TRITON_INTERPRET": "1"})


def run(group: str, interpreter: Server) -> None:
    """Run one group in a process of its own; nothing may skip."""
    code, output = interpreter.ask(group)
    assert code == 0, output[-8000:]
    assert " passed" in output
    assert "skipped" not in output


def _run(group: str) -> tuple[int, str]:
    """The exit status and the output of one group, in a fork: what one group changes, the next does not see."""
    import pytest

    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w")
            code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:randomly", group])
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read()


if __name__ == "__main__":
    # Imported once for all the forks.
    import hypothesis  # noqa: F401
    import triton  # noqa: F401

    import jrl_kernels  # noqa: F401

    serve(_run)
