"""The Triton backend of the Gumbel ops where there is no GPU: in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from tests.interpreter import groups, run
from tests.serving import Server


@pytest.mark.slow
@pytest.mark.parametrize("group", groups("gumbel"))
def test_in_the_interpreter(group: str, interpreter: Server) -> None:
    run(group, interpreter)
