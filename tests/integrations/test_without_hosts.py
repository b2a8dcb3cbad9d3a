"""Look-alikes need nothing but this package; the others name what they need. Parity with the hosts is in tests/hosts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

LOOK_ALIKES = ("late_interaction_kernels", "lightly", "open_clip", "pylate", "torchmultimodal")
SUBCLASSES = {
    "pytorch_metric_learning": "pytorch-metric-learning>=2.5",
    "sentence_transformers": "sentence-transformers>=6.2",
}
CODE = f"""
import sys
import jrl_kernels
optional = {(*LOOK_ALIKES, *SUBCLASSES, "torchvision", "transformers")!r}
for name in {LOOK_ALIKES!r}:
    __import__("jrl_kernels.integrations." + name)
assert not [name for name in optional if name in sys.modules]
"""


def test_look_alikes_import_no_library() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [name, *(other for other in sys.modules if other.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.delitem(sys.modules, f"jrl_kernels.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=f"needs it: pip install '{SUBCLASSES[name]}'"):
        importlib.import_module(f"jrl_kernels.integrations.{name}")
