"""The Triton backend of the Gumbel ops where there is no GPU: in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from tests import interpreter


@pytest.mark.slow
@pytest.mark.parametrize("group", interpreter.groups("gumbel"))
def test_in_the_interpreter(group: str) -> None:
    interpreter.run(group)
