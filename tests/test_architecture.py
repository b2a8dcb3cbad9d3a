"""The import table of the design, file lengths and declared dependencies, checked by walking the sources."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MAXIMUM_LINES = 450
OURS = ("jrl", "jrl_kernels")
PUBLIC_KERNELS = "jrl_kernels (public names)"
STANDARD_LIBRARY = "the standard library"
ANY_PACKAGE = "any package"


@dataclass(frozen=True)
class Import:
    target: str  # "jrl.training.Run" for `from jrl.training import Run`
    line: int
    top_level: bool
    for_types: bool = False  # under `if TYPE_CHECKING`: never executed


@dataclass(frozen=True)
class Room:
    """Files (first match decides) and what they may import; `{folder}` is the package a file lies in."""

    pattern: str
    ours: tuple[str, ...]
    packages: tuple[str, ...] = (ANY_PACKAGE,)
    never: tuple[str, ...] = ()


MODEL = ("triton", "lightning", "pytorch_lightning")
# What losses over a matrix of scores share: the forms of positives, and the gradients that follow from tiles of dL/ds.
SHARED = ("jrl_kernels._positives", "jrl_kernels._sweep")
ROOMS = (
    Room(r"jrl/systems/.*", ("jrl.systems", "jrl.objectives", "jrl.encoders", PUBLIC_KERNELS), never=MODEL),
    Room(r"jrl/objectives/.*", ("jrl.objectives", PUBLIC_KERNELS), never=MODEL),
    Room(r"jrl/encoders/.*", ("jrl.encoders", PUBLIC_KERNELS), never=MODEL),
    Room(r"jrl/data/.*", ("jrl.data", PUBLIC_KERNELS), never=MODEL),
    Room(
        r"jrl/evaluation/.*",
        ("jrl.evaluation", "jrl.data", "jrl.objectives", "jrl.encoders", PUBLIC_KERNELS),
        never=MODEL,
    ),
    Room(r"jrl/.*", ("jrl", PUBLIC_KERNELS), never=("triton",)),
    Room(r"jrl_kernels/ops/\w+/reference\.py", (), (STANDARD_LIBRARY, "torch")),
    Room(
        r"jrl_kernels/ops/\w+/triton_\w+\.py",
        ("{folder}", "jrl_kernels._triton", "jrl_kernels._triton_", "jrl_kernels._dispatch", *SHARED),
        (STANDARD_LIBRARY, "torch", "triton"),
        never=("torch.autograd", "torch.library", "{folder}.autograd", "{folder}.op", "{folder}.reference"),
    ),
    Room(
        r"jrl_kernels/ops/\w+/.*",
        (
            "{folder}",
            "jrl_kernels._checks",
            "jrl_kernels._dispatch",
            "jrl_kernels._extension",
            "jrl_kernels._operators",
            "jrl_kernels._cpu_tiles",
            "jrl_kernels._order",
            *SHARED,
        ),
        (STANDARD_LIBRARY, "torch", "numpy"),
    ),
    Room(
        r"jrl_kernels/_triton\w*\.py",
        ("jrl_kernels._triton", "jrl_kernels._triton_", "jrl_kernels._dispatch", *SHARED),
        (STANDARD_LIBRARY, "torch", "triton", "numpy"),
    ),
    Room(r"jrl_kernels/integrations/.*", ("jrl_kernels",)),
    Room(r"jrl_kernels/.*", ("jrl_kernels",), (STANDARD_LIBRARY, "torch", "numpy")),
)


def imports(path: Path, root: Path) -> Iterator[Import]:
    module = path.relative_to(root).with_suffix("").parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    inside = {id(child) for node in nodes if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
    typing_blocks = [
        node
        for node in nodes
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]
    typing = {
        id(child) for block in typing_blocks for statement in block.body for child in ast.walk(statement)
    }
    for node in nodes:
        top_level, for_types = id(node) not in inside, id(node) in typing
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, top_level, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = [*module[: len(module) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            for name in node.names:
                yield Import(".".join([*base, name.name]), node.lineno, top_level, for_types)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield Import(str(argument.value), node.lineno, top_level, for_types)


def under(target: str, prefix: str) -> bool:
    return target == prefix or target.startswith(prefix if prefix.endswith("_") else prefix + ".")


def public(target: str) -> bool:
    """Whether it is jrl_kernels, a public name of it or a public module that is meant for callers."""
    parts = target.split(".")
    return parts[0] == "jrl_kernels" and not any(p.startswith("_") or p in ("*", "ops") for p in parts[1:])


def allowed(found: Import, room: Room, folder: str) -> bool:
    package = found.target.split(".")[0]
    if package == "__future__":
        return True
    in_op = folder.startswith("jrl_kernels.ops.")
    if found.for_types and in_op and any(under(found.target, name) for name in (folder, *SHARED)):
        return True  # the annotation of a class of a sibling, or of one that ops share
    if any(under(found.target, name.format(folder=folder)) for name in room.never):
        return False
    if package in ("torchvision", "timm"):
        return not found.top_level
    if package not in OURS:
        groups = {STANDARD_LIBRARY: package in sys.stdlib_module_names, ANY_PACKAGE: True}
        return any(groups.get(name, package == name) for name in room.packages)
    for prefix in room.ours:
        if prefix == PUBLIC_KERNELS:
            if public(found.target):
                return True
        elif under(found.target, prefix.format(folder=folder)):
            return True
    return False


def import_violations(root: Path) -> list[str]:
    problems = []
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            room = next(room for room in ROOMS if re.fullmatch(room.pattern, name))
            folder = ".".join(path.relative_to(root).parent.parts)
            for found in imports(path, root):
                if not allowed(found, room, folder):
                    problems.append(f"{name}:{found.line} imports {found.target}")
    return problems


def include_violations(root: Path) -> list[str]:
    problems = []
    for path in sorted((root / "csrc").rglob("*.*")):
        name = path.relative_to(root).as_posix()
        if name == "csrc/bindings.cpp" or path.suffix not in (".cpp", ".cu", ".h", ".cuh"):
            continue
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            include = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', text)
            if include and re.match(r"(torch|ATen|c10|caffe2|pybind11|Python\.h|numpy)\b", include.group(1)):
                problems.append(f"{name}:{line} includes {include.group(1)}")
            if include and name.startswith("csrc/cpu/") and re.match(r"cu(da|blas)", include.group(1)):
                problems.append(f"{name}:{line} includes {include.group(1)}")
    return problems


def length_violations(root: Path) -> list[str]:
    problems = []
    for folder, suffixes in {
        "csrc": (".cpp", ".cu", ".h", ".cuh"),
        **dict.fromkeys(("jrl", "jrl_kernels", "tests", "benchmarks", "examples"), (".py",)),
    }.items():
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in suffixes:
                lines = len(path.read_text(encoding="utf-8").splitlines())
                if lines > MAXIMUM_LINES:
                    problems.append(
                        f"{path.relative_to(root)} has {lines} lines; the limit is {MAXIMUM_LINES}"
                    )
    return problems


def test_the_import_table_holds() -> None:
    assert import_violations(ROOT) == []


def test_only_the_bindings_know_python() -> None:
    assert include_violations(ROOT) == []


def test_files_stay_short() -> None:
    assert length_violations(ROOT) == []


def test_every_op_has_its_files() -> None:
    for folder in sorted((ROOT / "jrl_kernels" / "ops").glob("*/")):
        if folder.name != "__pycache__":
            missing = {"__init__.py", "op.py", "reference.py", "cases.py"} - {
                path.name for path in folder.iterdir()
            }
            assert not missing, f"{folder.name} lacks {sorted(missing)}"


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("jrl/systems/a.py", "from jrl.training import Run", "imports jrl.training.Run"),
        ("jrl/systems/a.py", "from ..data import sample", "imports jrl.data.sample"),
        ("jrl/systems/a.py", "import triton", "imports triton"),
        ("jrl/systems/a.py", "def f():\n    import lightning", "imports lightning"),
        ("jrl/objectives/a.py", "from jrl.systems import CLIP", "imports jrl.systems.CLIP"),
        ("jrl/objectives/a.py", "from jrl_kernels import _extension", "imports jrl_kernels._extension"),
        (
            "jrl/objectives/a.py",
            "from jrl_kernels.ops.info_nce import info_nce",
            "imports jrl_kernels.ops.info_nce",
        ),
        ("jrl/encoders/a.py", "from jrl_kernels import *", "imports jrl_kernels.*"),
        (
            "jrl/encoders/a.py",
            "import importlib\nimportlib.import_module('jrl.systems')",
            "imports jrl.systems",
        ),
        ("jrl/encoders/a.py", "import timm", "imports timm"),
        ("jrl/data/a.py", "import jrl.training.data", "imports jrl.training.data"),
        ("jrl/evaluation/a.py", "from ..systems import base", "imports jrl.systems.base"),
        (
            "jrl/training/a.py",
            "from jrl_kernels._dispatch import select",
            "imports jrl_kernels._dispatch.select",
        ),
        (
            "jrl/cli.py",
            "import jrl_kernels.ops.info_nce.reference",
            "imports jrl_kernels.ops.info_nce.reference",
        ),
        ("jrl_kernels/ops/a/op.py", "from ..b import op", "imports jrl_kernels.ops.b.op"),
        ("jrl_kernels/ops/a/op.py", "import triton", "imports triton"),
        ("jrl_kernels/ops/a/op.py", "import transformers", "imports transformers"),
        ("jrl_kernels/ops/a/triton_kernel.py", "from ... import _checks", "imports jrl_kernels._checks"),
        ("jrl_kernels/ops/a/triton_kernel.py", "from . import op", "imports jrl_kernels.ops.a.op"),
        (
            "jrl_kernels/ops/a/triton_kernel.py",
            "from torch.autograd import Function",
            "imports torch.autograd",
        ),
        ("jrl_kernels/ops/a/reference.py", "from . import cases", "imports jrl_kernels.ops.a.cases"),
        (
            "jrl_kernels/ops/a/triton_tiles.py",
            "from ..b.triton_tiles import f",
            "imports jrl_kernels.ops.b.triton_tiles.f",
        ),
        ("jrl_kernels/ops/a/reference.py", "import numpy", "imports numpy"),
        ("jrl_kernels/_dispatch.py", "import jrl.systems", "imports jrl.systems"),
        ("jrl_kernels/__init__.py", "import PIL.Image", "imports PIL.Image"),
    ],
)
def test_a_forbidden_import_is_caught(tmp_path: Path, name: str, source: str, problem: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    (found,) = import_violations(tmp_path)
    assert found.startswith(f"{name}:")
    assert problem in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "jrl/systems/a.py",
            "from ..objectives import b\nfrom jrl_kernels import info_nce\nimport jrl_kernels",
        ),
        (
            "jrl/training/a.py",
            "import lightning\nfrom jrl.systems import CLIP\nimport jrl_kernels.distributed",
        ),
        ("jrl/data/a.py", "def f():\n    import torchvision"),
        (
            "jrl_kernels/ops/a/op.py",
            "from . import reference\nfrom ... import _checks, _dispatch\nimport torch",
        ),
        (
            "jrl_kernels/ops/a/triton_kernel.py",
            "import triton\nfrom .triton_tiles import f\nfrom ..._triton import g",
        ),
        ("jrl_kernels/ops/a/reference.py", "from __future__ import annotations\nimport math\nimport torch"),
        ("jrl_kernels/ops/a/reference.py", "import torch\nif TYPE_CHECKING:\n    from .op import Options"),
        ("jrl_kernels/integrations/a.py", "import transformers\nfrom jrl_kernels import info_nce"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, name: str, source: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    assert import_violations(tmp_path) == []


def test_a_forbidden_include_and_a_long_file_are_caught(tmp_path: Path) -> None:
    for folder in ("include/jrl", "cuda", "cpu"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    (tmp_path / "csrc/include/jrl/a.h").write_text("#include <Python.h>\n")
    (tmp_path / "csrc/cuda/a.cu").write_text("#include <torch/extension.h>\n# include <ATen/ATen.h>\n")
    (tmp_path / "csrc/cpu/a.cpp").write_text('#include "pybind11/pybind11.h"\n#include <cuda_runtime.h>\n')
    (tmp_path / "csrc/bindings.cpp").write_text("#include <pybind11/pybind11.h>\n")
    assert len(include_violations(tmp_path)) == 5
    assert length_violations(tmp_path) == []
    (tmp_path / "csrc/cpu/a.cpp").write_text("\n" * (MAXIMUM_LINES + 1))
    assert length_violations(tmp_path) == ["csrc/cpu/a.cpp has 451 lines; the limit is 450"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = names(PROJECT["dependencies"])
EXTRAS = {name: names(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}


def test_every_imported_package_is_declared() -> None:
    distributions = importlib.metadata.packages_distributions()
    every_extra = set().union(*EXTRAS.values())
    undeclared = []
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            for found in imports(path, ROOT):
                top = found.target.split(".")[0]
                if top in sys.stdlib_module_names or top in OURS:
                    continue
                declared = CORE | (EXTRAS["train"] if package == "jrl" else set())
                if not found.top_level or "integrations" in path.parts:
                    declared = CORE | every_extra
                providers = {name.lower().replace("_", "-") for name in distributions.get(top, [top])}
                if not providers & declared:
                    undeclared.append(f"{path.relative_to(ROOT)}:{found.line} imports {top}")
    assert undeclared == []


IMPORT_QUIETLY = """
import sys
import torch, numpy
def watch(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system"):
        raise AssertionError(f"import jrl_kernels starts a process: {event} {arguments}")
sys.addaudithook(watch)
before = set(sys.modules)
import jrl_kernels
assert not torch.cuda.is_initialized(), "a GPU was touched"
assert "jrl_kernels._C" not in sys.modules, "the extension was loaded"
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_jrl_kernels_compiles_nothing_and_touches_no_gpu() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORT_QUIETLY], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imported = result.stdout.split()
    assert "jrl_kernels" in imported
    distributions = importlib.metadata.packages_distributions()
    optional = set().union(*EXTRAS.values()) - CORE - {"jrl"}
    for name in imported:
        assert name != "jrl", "jrl_kernels stands alone"
        assert (
            not {provider.lower().replace("_", "-") for provider in distributions.get(name, [])} & optional
        ), name
