"""`python -m jrl_kernels.info [--json]`: what this machine has, what was compiled, which backend serves which op and why not."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import platform
import re
from pathlib import Path
from typing import Any

import torch

from . import _extension, ops

CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def collect() -> dict[str, Any]:
    """Everything `python -m jrl_kernels.info` prints, as plain JSON types."""
    missing = _extension.unavailable()
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "extension": {
            "available": missing is None,
            "reason": None if missing is None else missing[0],
            "fix": None if missing is None else missing[1],
            "launchers": _extension.get().launchers() if missing is None else {},
            "build": _extension.build_info(),
        },
        "ops": _ops(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    return {
        "jrl": _version("jrl") or _extension.build_info().get("version"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "driver": _driver(),
        "driver_cuda": _driver_cuda(),
    }


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text()) if path.is_file() else None
    return match.group(1) if match else None


def _driver_cuda() -> str | None:
    """The newest CUDA version that the driver serves; asking for it starts nothing on the GPU."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cpu() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return {
        "model": model.group(1).strip() if model else platform.processor() or platform.machine(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "features": [feature for feature in CPU_FEATURES if feature in present],
        "threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def _ops() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for entry in sorted(pkgutil.iter_modules(ops.__path__), key=lambda module: module.name):
        if not entry.ispkg:
            continue
        package = importlib.import_module(f"{ops.__name__}.{entry.name}")
        table = importlib.import_module(f"{package.__name__}.op").BACKENDS
        backends = {}
        for name, backend in table.items():
            missing = backend.unavailable()
            backends[name] = {
                "serves": missing is None,
                "reason": None if missing is None else missing[0],
                "fix": None if missing is None else missing[1],
            }
        functions = [name for name in package.__all__ if inspect.isfunction(getattr(package, name))]
        result[entry.name] = {"functions": functions, "backends": backends}
    return result


def render(info: dict[str, Any]) -> str:
    """`collect()` as text."""
    lines = ["Versions"]
    names = {"torch_cuda": "CUDA of torch", "driver": "NVIDIA driver", "driver_cuda": "CUDA of the driver"}
    for key, value in info["versions"].items():
        lines.append(f"  {names.get(key, key):<20}{value or 'none'}")
    cpu = info["cpu"]
    lines += ["", "Hardware", f"  {'CPU':<20}{cpu['model']}, {cpu['threads']} threads used"]
    lines.append(
        f"  {'CPU features':<20}{' '.join(cpu['features']) or 'none known'} (torch: {cpu['torch_capability']})"
    )
    for gpu in info["gpus"]:
        capability, memory = gpu["compute_capability"], gpu["memory_gib"]
        lines.append(f"  {'GPU':<20}{gpu['name']}, compute capability {capability}, {memory} GiB")
    if not info["gpus"]:
        lines.append(f"  {'GPU':<20}none that PyTorch can use")
    return "\n".join([*lines, "", *_render_extension(info["extension"]), "", *_render_ops(info["ops"])])


def _render_extension(extension: dict[str, Any]) -> list[str]:
    lines = ["Compiled extension"]
    if not extension["available"]:
        lines += [f"  missing: {extension['reason']}", f"  to fix:  {extension['fix']}"]
        return lines
    build = extension["build"]
    openmp = "with OpenMP" if build["openmp"] else "without OpenMP: one thread"
    lines.append(
        f"  {'CPU':<20}{', '.join(build['cpu_sources']) or 'no source'} ({build['compiler']}, {openmp})"
    )
    cuda = build["cuda"]
    if cuda["compiled"]:
        lines.append(f"  {'CUDA':<20}{', '.join(cuda['sources'])} (nvcc {cuda['nvcc']})")
        lines.append(f"  {'architectures':<20}{' '.join(cuda['architectures'])}")
    else:
        lines.append(
            f"  {'CUDA':<20}not compiled: {cuda['skipped']['reason']} (to fix: {cuda['skipped']['fix']})"
        )
    lines += [f"  {'':<20}{note}" for note in cuda["notes"]]
    return lines


def _render_ops(table: dict[str, Any]) -> list[str]:
    lines = ["Backends"]
    for op, entry in table.items():
        lines.append(f"  {op}: {', '.join(entry['functions'])}")
        for name, backend in entry["backends"].items():
            if backend["serves"]:
                lines.append(f"    {name:<12}serves")
            else:
                lines.append(f"    {name:<12}does not serve: {backend['reason']}")
                lines.append(f"    {'':<12}to fix: {backend['fix']}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jrl_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else render(info))


if __name__ == "__main__":
    main()
