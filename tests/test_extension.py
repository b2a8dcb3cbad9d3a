"""The generic binding: which arguments it takes, what it refuses, what it costs, and what is said when it is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from pathlib import Path
from types import ModuleType

import pytest
import torch

from jrl_kernels import _extension

ROOT = Path(__file__).resolve().parents[1]

LAUNCHERS = """
#include "jrl/registry.h"

#include <chrono>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <thread>

enum class Status { fine = 0, broken = 7 };

int store(double* out, const float* in, std::int64_t a, std::int32_t b, bool c, double d, float e, std::uint64_t f,
          std::uint8_t g) {
  out[0] = in == nullptr ? -1.0 : in[0];
  out[1] = static_cast<double>(a);
  out[2] = b;
  out[3] = c ? 1.0 : 0.0;
  out[4] = d;
  out[5] = e;
  out[6] = f == std::numeric_limits<std::uint64_t>::max() ? 1.0 : 0.0;
  out[7] = g;
  return 0;
}
JRL_LAUNCHER(store);

Status fail(std::int64_t code) { return static_cast<Status>(code); }
JRL_LAUNCHER(fail);

int throw_error() { throw std::runtime_error("from C++"); }
JRL_LAUNCHER(throw_error);

namespace jrl {
int sleep_milliseconds(std::int64_t milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  return 0;
}
JRL_LAUNCHER(sleep_milliseconds);

int twenty(const void*, const void*, const void*, const void*, const void*, void*, void*, void*, std::int64_t,
           std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, double, double, double, double, bool,
           bool) {
  return 0;
}
JRL_LAUNCHER(twenty);
}  // namespace jrl
"""


def build(folder: Path, source: str) -> Path:
    """The binding with the launchers of `source`, compiled by the project's own setup.py."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    for name in ("csrc/include", "csrc/bindings.cpp", "setup.py", "pyproject.toml", "LICENSE"):
        origin, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, target)
        else:
            shutil.copyfile(origin, target)
    (folder / "README.md").write_text("README\n")
    (folder / "jrl_kernels").mkdir()
    (folder / "csrc" / "cpu").mkdir()
    (folder / "csrc" / "cpu" / "trial.cpp").write_text(source)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "JRL_CUDA": "0"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "jrl_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parents[1].name}._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load(build(tmp_path_factory.mktemp("binding"), LAUNCHERS))


def test_every_kind_of_argument_arrives(module: ModuleType) -> None:
    out = torch.empty(8, dtype=torch.float64)
    given = torch.tensor([2.5])
    module.launch("store", out.data_ptr(), given.data_ptr(), -(2**62), -7, True, 0.1, 0.5, 2**64 - 1, 255)
    assert out.tolist() == [2.5, -(2.0**62), -7, 1, 0.1, 0.5, 1, 255]
    module.launch("store", out.data_ptr(), None, True, 0, 0, 3, 4, 0, 0)
    assert out.tolist() == [-1, 1, 0, 0, 3, 4, 0, 0]


def test_signatures_are_readable(module: ModuleType) -> None:
    launchers = module.launchers()
    assert sorted(launchers) == ["fail", "sleep_milliseconds", "store", "throw_error", "twenty"]
    expected = "store(float64*, const float32*, int64, int32, bool, float64, float32, uint64, uint8)"
    assert launchers["store"] == expected


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, 1.5, TypeError, r"argument 0 of store\(.*\): expected an address \(int\) or None, got float"),
        (0, torch.zeros(1), TypeError, "expected an address .* got Tensor"),
        (0, True, TypeError, "expected an address .* got bool"),
        (0, 2**64, ValueError, "18446744073709551616 does not fit float64*"),
        (2, 1.0, TypeError, "argument 2 of store.*expected an int, got float"),
        (2, torch.tensor(1), TypeError, "expected an int, got Tensor"),
        (2, None, TypeError, "expected an int, got NoneType"),
        (2, 2**63, ValueError, "9223372036854775808 does not fit int64"),
        (3, 2**31, ValueError, "2147483648 does not fit int32"),
        (4, 2, ValueError, "2 does not fit bool"),
        (4, "yes", TypeError, "expected a bool, got str"),
        (5, "0.5", TypeError, "expected a float, got str"),
        (5, torch.tensor(0.5), TypeError, "expected a float, got Tensor"),
        (5, 10**400, ValueError, "does not fit float64"),
        (7, -1, ValueError, "-1 does not fit uint64"),
        (8, 256, ValueError, "256 does not fit uint8"),
    ],
)
def test_wrong_arguments_are_refused(
    module: ModuleType, index: int, value: object, error: type[Exception], message: str
) -> None:
    out = torch.zeros(8, dtype=torch.float64)
    arguments: list[object] = [out.data_ptr(), None, 1, 1, True, 1.0, 1.0, 1, 1]
    arguments[index] = value
    with pytest.raises(error, match=message):
        module.launch("store", *arguments)
    assert not out.any(), "the launcher ran"


def test_wrong_name_and_count_are_refused(module: ModuleType) -> None:
    with pytest.raises(
        ValueError, match=r"no launcher named 'stone' was compiled; there are: fail, .*, store"
    ):
        module.launch("stone", 1)
    with pytest.raises(TypeError, match=r"fail\(int64\) takes 1 arguments, got 2"):
        module.launch("fail", 1, 2)
    with pytest.raises(TypeError):
        module.launch(3)
    with pytest.raises(TypeError):
        module.launch("fail", code=3)


def test_an_error_code_raises(module: ModuleType) -> None:
    module.launch("fail", 0)
    with pytest.raises(RuntimeError, match=r"^fail failed with error code 7$"):
        module.launch("fail", 7)
    with pytest.raises(RuntimeError, match=r"from C\+\+"):
        module.launch("throw_error")


def test_the_interpreter_is_free_during_a_launch(module: ModuleType) -> None:
    threads = [threading.Thread(target=module.launch, args=("sleep_milliseconds", 300)) for _ in range(4)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - start < 0.9


def test_a_launch_costs_little(module: ModuleType) -> None:
    arguments = [2**40 + i for i in range(14)] + [0.5] * 4 + [True, False]
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            module.launch("twenty", *arguments)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 8e-6, f"{best * 1e6:.2f} µs a call"


def test_two_launchers_of_one_name_fail_the_import(tmp_path: Path) -> None:
    source = '#include "jrl/registry.h"\nint f() { return 0; }\nJRL_LAUNCHER(f);\nnamespace a {\nJRL_LAUNCHER(f);\n}\n'
    path = build(tmp_path, source)
    with pytest.raises(ImportError, match="two launchers are named f"):
        load(path)


def test_the_extension_shares_the_threads_of_torch() -> None:
    if not _extension.available():
        pytest.skip(f"needs the extension: {_extension.why_missing()}")
    if not _extension.build_info()["openmp"] or not sys.platform.startswith("linux"):
        pytest.skip("the extension was built without OpenMP")
    code = (
        "import jrl_kernels; from jrl_kernels import _extension; _extension.get()\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(*sorted({line.split()[-1] for line in lines if 'libgomp' in line or 'libiomp' in line}), sep='\\n')"
    )
    runtimes = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    assert len(runtimes) == 1, runtimes
    assert Path(runtimes[0]).is_relative_to(Path(torch.__file__).parent.parent)


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of its own around a copy of `_extension.py`, as if nothing had ever been built."""
    package = tmp_path / f"unbuilt_{uuid.uuid4().hex}"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "jrl_kernels" / "_extension.py", package)
    monkeypatch.syspath_prepend(tmp_path)
    return package


def explanation(package: Path) -> str:
    extension = importlib.import_module(f"{package.name}._extension")
    assert not extension.available()
    assert not extension.available("f_cpu")
    with pytest.raises(ImportError) as caught:
        extension.launch("f", 1)
    assert extension.why_missing() in str(caught.value)
    return str(caught.value)


def test_an_extension_that_was_never_built(unbuilt: Path) -> None:
    expected = "jrl_kernels has no compiled extension: it has not been built. To fix: pip install -e ."
    assert explanation(unbuilt) == expected


def test_an_extension_that_was_skipped(unbuilt: Path) -> None:
    skipped = {"reason": "no C++ compiler was found", "fix": "apt install g++"}
    (unbuilt / "_build_info.json").write_text(json.dumps({"skipped": skipped}))
    expected = "it was skipped when the package was built: no C++ compiler was found. To fix: apt install g++"
    assert expected in explanation(unbuilt)


def test_an_extension_of_another_python(unbuilt: Path) -> None:
    (unbuilt / "_C.cpython-38-none.so").touch()
    assert "it was built for another Python (_C.cpython-38-none.so)" in explanation(unbuilt)


def test_an_extension_that_does_not_load(unbuilt: Path) -> None:
    (unbuilt / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    assert "_C was built but does not load" in explanation(unbuilt)


def test_a_launcher_that_is_not_there_is_explained() -> None:
    if not _extension.available():
        pytest.skip(f"needs the extension: {_extension.why_missing()}")
    reason, fix = _extension.unavailable("no_such_op_cpu") or ("", "")
    assert "does not contain no_such_op_cpu" in reason
    assert fix == "pip install -e ."
    if not _extension.build_info()["cuda"]["compiled"]:
        assert "no_such_op_cuda was not compiled: " in (_extension.why_missing("no_such_op_cuda") or "")
