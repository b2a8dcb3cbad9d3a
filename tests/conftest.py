from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True, print_blob=True)
settings.load_profile("default")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers already occupy the cores; threads of each would only contend.
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--forbid-skips", action="store_true", help="fail when a test marked gpu skips, or when none runs"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --forbid-skips, files without a gpu test are left out: a GPU machine need not have what they import."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    if is_test and config.getoption("--forbid-skips"):
        text = collection_path.read_text()
        return True if "mark.gpu" not in text and "conformance" not in text else None
    return None


def pytest_configure(config: pytest.Config) -> None:
    """One cache of compiled kernels for all the workers of a run; it goes when the run ends."""
    if not hasattr(config, "workerinput"):
        cache = tempfile.TemporaryDirectory(prefix="triton-aot-", ignore_cleanup_errors=True)
        os.environ["JRL_TEST_CACHE"] = cache.name
        config.add_cleanup(cache.cleanup)


def _shares_work(item: Any) -> bool:
    """Whether a test reads what a fixture of its module has prepared."""
    definitions = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
    return any(definition.scope == "module" for found in definitions for definition in found)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # pytest-xdist deals out the groups, then the other tests in this order: no worker idles while another does a long one.
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        for item in items:
            if _shares_work(item) and not any(item.iter_markers("xdist_group")):
                item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and PyTorch sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if not config.getoption("--forbid-skips") or hasattr(config, "workerinput") or reporter is None:
        return
    skipped = len(reporter.stats.get("skipped", []))
    ran = sum(len(reporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "error"))
    if skipped or not ran:
        reporter.write_line("")
        reporter.write_line(f"--forbid-skips: {skipped} skipped, {ran} ran", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def nan_filled_allocations() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN (integers: the largest value), so an unwritten output shows."""
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch fills memory only while it is asked for deterministic algorithms; warn_only lets the others run all the same.
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    memory.fill_uninitialized_memory = fill
