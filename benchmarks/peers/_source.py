"""One file of an installed package, without the rest of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def module(package: str, file: str) -> ModuleType:
    """The module in `file` of an installed package whose own `__init__` is not run.

    For packages that import, along with a loss of a few lines, libraries of compiled image operators: those fail to import
    wherever they were built for another PyTorch. The file itself must need nothing of its package.
    """
    name = f"{__name__}.{package}.{Path(file).stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"no package {package}")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ImportError(f"{package} has no {file}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.modules[name] = loaded
    return loaded
