from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests import interpreter as triton_interpreter
from tests.serving import Server

if TYPE_CHECKING:
    from tests.triton_aot import Compiler


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Server]:
    """Runs groups of tests in Triton's interpreter."""
    server = triton_interpreter.server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def compile_server() -> Iterator[Server]:
    """Compiles Triton kernels, with a cache for this run alone, which the workers of pytest-xdist share."""
    from tests import triton_aot

    server = triton_aot.server(os.environ["JRL_TEST_CACHE"])
    yield server
    server.close()


@pytest.fixture
def compile_case(request: pytest.FixtureRequest, compile_server: Server) -> Compiler:
    """Compiles one of the cases of the file that asks."""
    from tests.triton_aot import Compiler

    return Compiler(compile_server, request.path)
