"""Running the kernels of csrc/cuda on a CPU: the sources are compiled against an emulation of CUDA's execution model.

It shows wrong results, races through a missing barrier's order, deadlocks and reads of unwritten shared memory; not speed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compiler() -> str | None:
    """The C++ compiler that builds the emulation, if this machine has one."""
    return shutil.which("c++") or shutil.which("g++")


def build(folder: Path, sources: Sequence[Path] = SOURCES) -> Any:
    """A module like `jrl_kernels._C` with the launchers of `sources`, whose pointers are to CPU memory.

    Raises:
        RuntimeError: the sources do not compile; the message holds the compiler's.
    """
    import pybind11

    command = compiler()
    assert command is not None
    (folder / "jrl_build_info.h").write_text('#define JRL_BUILD_INFO "{}"\n')
    target = _target(folder)
    includes = [
        folder,
        ROOT / "tests" / "cuda_on_host",
        ROOT / "csrc" / "include",
        Path(sysconfig.get_paths()["include"]),
        Path(pybind11.get_include()),
    ]
    done = subprocess.run(
        [command, "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-DJRL_CUDA_ON_HOST"]
        + [f"-I{path}" for path in includes]
        + ["-x", "c++", str(ROOT / "csrc" / "bindings.cpp"), *map(str, sources), "-o", str(target)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-8000:])
    return load(folder)


def _target(folder: Path) -> Path:
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(folder: Path) -> Any:
    """The module that `build` left in a folder."""
    # pybind11 hands out one module a name: each folder's has its own.
    spec = importlib.util.spec_from_file_location(f"{folder.as_posix()}._C".lstrip("/"), _target(folder))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Host:
    """Stands in for `_extension.launch_cuda`: the same launchers, on CPU tensors."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, name: str, device: Any, *arguments: Any) -> None:
        self.module.launch(name, *arguments, 0)
