"""Processes that tests keep for as long as they run: what one has imported, its next answers need not wait for again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Server:
    """A Python module, run, that answers each line of JSON on its standard input with one on its standard output.

    It starts at the first question, and again at the next one after it ended.
    """

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        self.module, self.environment = module, environment
        self.process: subprocess.Popen[str] | None = None

    def ask(self, question: Any) -> Any:
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BaseException:
            # A test that ran out of time must not leave its answer to the next.
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=60)
            raise
        if not answer:
            raise RuntimeError(f"{self.module} ended with code {self.process.wait()}; its errors are above")
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
            env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **self.environment},
        )  # fmt: skip

    def close(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer the lines of standard input; what else is printed goes to standard error, not to be taken for an answer."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
