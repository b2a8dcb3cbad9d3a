"""Wheels in the three situations, built in isolation without torch, loaded by an interpreter that has never seen torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

CUDA_LAUNCHER = """
#include "jrl/registry.h"

__global__ void double_kernel(float* x, long long n) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= 2;
}

cudaError_t double_values_cuda(float* x, std::int64_t n, cudaStream_t stream) {
  double_kernel<<<(n + 255) / 256, 256, 0, stream>>>(x, n);
  return cudaGetLastError();
}
JRL_LAUNCHER(double_values_cuda);
"""

CPU_LAUNCHER = """
#include "jrl/registry.h"

int double_values_cpu(float* x, std::int64_t n) {
#pragma omp parallel for
  for (std::int64_t i = 0; i < n; ++i) x[i] *= 2;
  return 0;
}
JRL_LAUNCHER(double_values_cpu);
"""

USE_CPU = """
import ctypes, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("jrl_kernels._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
values = (ctypes.c_float * 3)(1, 2, 3)
module.launch("double_values_cpu", ctypes.addressof(values), 3)
assert list(values) == [2, 4, 6]
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("numpy") is None
error = ""
if "double_values_cuda" in module.launchers() and sys.argv[2:] == ["no-gpu"]:
    try:
        module.launch("double_values_cuda", 0, 3, None)
    except RuntimeError as caught:
        error = str(caught)
print(json.dumps({"launchers": module.launchers(), "build_info": module.build_info(), "error": error}))
"""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project without its history and build outputs, with two launchers more."""
    copy = tmp_path / "project"
    for name in ("csrc", "jrl", "jrl_kernels"):
        ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "README.md").write_text("jrl\n")
    # The project's own sources are compiled by everything else; these few lines keep four builds short.
    for folder, name, text in (("cpu", "trial.cpp", CPU_LAUNCHER), ("cuda", "trial.cu", CUDA_LAUNCHER)):
        shutil.rmtree(copy / "csrc" / folder, ignore_errors=True)
        (copy / "csrc" / folder).mkdir()
        (copy / "csrc" / folder / name).write_text(text)
    return copy


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with no package at all."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def path_without(folder: Path, *names: str) -> str:
    """A PATH of links to every program but the named ones (and their versions, as in g++-12)."""
    folder.mkdir()
    for entry in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(entry).iterdir() if Path(entry).is_dir() else []:
            if not any(program.name == name or program.name.startswith(f"{name}-") for name in names):
                link = folder / program.name
                link.unlink(missing_ok=True)
                link.symlink_to(program)
    return str(folder)


def pip(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH", "JRL_CUDA")
    }
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**kept, **environment})


def build_wheel(project: Path, **environment: str) -> tuple[Path, str]:
    result = pip("wheel", ".", "--no-deps", "-v", "-w", "dist", cwd=project, **environment)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log[-4000:]
    (wheel,) = (project / "dist").glob("*.whl")
    return wheel, log


def said(log: str) -> list[str]:
    """The lines of setup.py about what it builds."""
    return sorted({line.strip() for line in log.splitlines() if line.strip().startswith("jrl: ")})


def unpack(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    zipfile.ZipFile(wheel).extractall(folder)
    assert not list(folder.rglob("test_*.py"))
    return folder


def use(python: Path, extension: Path, *arguments: str) -> Any:
    result = subprocess.run([python, "-c", USE_CPU, extension, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def fatbin_architectures(path: Path) -> list[str]:
    """Targets of the device code in a binary: "sm_80" for machine code, "compute_100" for PTX."""
    data = path.read_bytes()
    found = set()
    start = data.find(b"\x50\xed\x55\xba")
    while start >= 0:
        header = int.from_bytes(data[start + 6 : start + 8], "little")
        end = start + header + int.from_bytes(data[start + 8 : start + 16], "little")
        entry = start + header
        while entry < end:
            kind = int.from_bytes(data[entry : entry + 2], "little")
            size = int.from_bytes(data[entry + 4 : entry + 8], "little")
            payload = int.from_bytes(data[entry + 8 : entry + 16], "little")
            architecture = int.from_bytes(data[entry + 28 : entry + 32], "little")
            found.add(("compute_" if kind == 1 else "sm_") + str(architecture))
            entry += size + payload
        start = data.find(b"\x50\xed\x55\xba", end)
    return sorted(found)


def test_wheel_with_nvcc(project: Path, bare_python: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    environment = {"JRL_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5 8.0;9.0a;10.0+PTX", "MAX_JOBS": "2"}
    environment["PATH"] = f"{Path(nvcc).parent}{os.pathsep}{os.environ['PATH']}"
    wheel, log = build_wheel(project, **environment)
    (line,) = said(log)
    assert line.startswith("jrl: CPU and CUDA extension: nvcc ")
    assert line.endswith(", 8.0 9.0a 10.0+PTX")
    extension = unpack(wheel) / "jrl_kernels" / f"_C{SUFFIX}"
    assert fatbin_architectures(extension) == ["compute_100", "sm_100", "sm_80", "sm_90"]
    # The static runtime needs no library of CUDA, the driver's included, until a launch; then its error is readable.
    environment["PATH"] = "/nonexistent"
    used = use(bare_python, extension, *([] if Path("/dev/nvidiactl").exists() else ["no-gpu"]))
    assert used["launchers"]["double_values_cuda"] == "double_values_cuda(float32*, int64, opaque*)"
    cuda = used["build_info"]["cuda"]
    assert cuda["architectures"] == ["8.0", "9.0a", "10.0+PTX"]
    assert cuda["sources"] == ["trial.cu"]
    assert cuda["notes"] == ["7.5 was left out: the kernels need compute capability 8.0 or newer"]
    if not Path("/dev/nvidiactl").exists():
        assert used["error"].startswith("double_values_cuda failed with error code ")
        assert (
            "CUDA driver version is insufficient" in used["error"]
            or "no CUDA-capable device" in used["error"]
        )
    needed = subprocess.run(["ldd", str(extension)], capture_output=True, text=True).stdout
    assert not any(name in needed for name in ("cudart", "libcuda", "torch"))


def test_wheel_without_nvcc(project: Path, bare_python: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    wheel, log = build_wheel(project, CUDA_HOME=str(tmp_path))
    (line,) = said(log)
    assert line.startswith("jrl: CPU extension only: nvcc was not found (CUDA_HOME is")
    assert line.endswith("to fix: install the CUDA toolkit, then: JRL_CUDA=1 pip install -e .")
    folder = unpack(wheel)
    used = use(bare_python, folder / "jrl_kernels" / f"_C{SUFFIX}")
    assert used["launchers"] == {"double_values_cpu": "double_values_cpu(float32*, int64)"}
    assert used["build_info"]["cuda"]["compiled"] is False
    assert used["build_info"] == json.loads((folder / "jrl_kernels" / "_build_info.json").read_text())


def test_wheel_without_compiler(project: Path, bare_python: Path, tmp_path: Path) -> None:
    path = path_without(tmp_path / "bin", "c++", "g++", "gcc", "cc", "clang", "clang++", "nvcc")
    (project / "jrl_kernels" / f"_C{SUFFIX}").write_bytes(b"left over from an earlier build in place")
    wheel, log = build_wheel(project, PATH=path)
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = said(log)
    assert line.startswith(
        "jrl: extension skipped: no C++ compiler was found (looked for c++, g++, clang++); to fix: "
    )
    folder = unpack(wheel)
    assert not list(folder.rglob("*.so")), "a binary in a wheel for every platform"
    assert (folder / "jrl_kernels" / "py.typed").exists()
    info = json.loads((folder / "jrl_kernels" / "_build_info.json").read_text())
    assert info["extension"] is False
    assert "no C++ compiler" in info["skipped"]["reason"]
    compiled = subprocess.run([bare_python, "-m", "compileall", "-q", folder], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JRL_CUDA": "2"}, "jrl: JRL_CUDA: expected 0, 1 or nothing, got '2'"),
        ({"JRL_CUDA": "0", "MAX_JOBS": "many"}, "jrl: MAX_JOBS: expected a positive integer, got 'many'"),
        ({"JRL_CUDA": "1", "CXX": "no-such-compiler"}, "jrl: JRL_CUDA=1, but no C++ compiler was found"),
        ({"JRL_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "jrl: JRL_CUDA=1, but nvcc was not found"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "jrl: TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a"),
        (
            {"TORCH_CUDA_ARCH_LIST": "7.0"},
            "jrl: TORCH_CUDA_ARCH_LIST names no compute capability of 8.0 or newer",
        ),
        ({"TORCH_CUDA_ARCH_LIST": "49.0"}, "cannot compile for 49.0"),
    ],
)
def test_a_build_that_cannot_be_done_says_so(
    project: Path, environment: dict[str, str], message: str
) -> None:
    if shutil.which("c++") is None or ("TORCH_CUDA_ARCH_LIST" in environment and find_nvcc() is None):
        pytest.skip("needs a C++ compiler, and nvcc for its architectures")
    (project / "csrc" / "cpu" / "trial.cpp").write_text("")
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CXX", "JRL_CUDA", "TORCH_CUDA_ARCH_LIST")
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, env={**kept, **environment})
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((project / "jrl_kernels").glob("_C*"))


def test_a_source_that_does_not_compile_fails_the_build(project: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    (project / "csrc" / "cpu" / "trial.cpp").write_text("this is not C++\n")
    result = pip(
        "wheel", ".", "--no-deps", "--no-build-isolation", "-v", "-w", "dist", cwd=project, JRL_CUDA="0"
    )
    assert result.returncode != 0
    assert "trial.cpp:1" in result.stdout + result.stderr
    assert not list(project.glob("dist/*.whl"))


def test_sdist_holds_the_sources(project: Path) -> None:
    command = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_sdist('dist'))"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (archive,) = (project / "dist").glob("jrl-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    expected = {
        "csrc/bindings.cpp",
        "csrc/include/jrl/registry.h",
        "csrc/cpu/trial.cpp",
        "csrc/cuda/trial.cu",
    }
    expected |= {"setup.py", "pyproject.toml", "LICENSE", "jrl_kernels/_extension.py", "jrl_kernels/py.typed"}
    assert expected <= names, expected - names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]


def test_setup_never_imports_torch() -> None:
    command = [sys.executable, "-X", "importtime", "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not [line for line in result.stderr.splitlines() if line.endswith(("| torch", " torch"))]
