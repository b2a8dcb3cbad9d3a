"""The peers of the benchmarks: each computes the op's own numbers, and one that cannot says why.

Those that run on a CPU are held against float64 as they are. Kernels that need a GPU are run in Triton's interpreter where they
can be; and the call of every such library is checked by putting plain PyTorch behind the library's own signature.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import PEERS, Peer, _source, contrastive, installed
from benchmarks.peers.peer import INSTALLED_OTHERWISE
from benchmarks.workloads import WORKLOADS
from benchmarks.workloads.workload import Function

ROOT = Path(__file__).resolve().parents[1]
ALL = [(op, name) for op, peers in PEERS.items() for name in peers]
ON_CPU = [(op, name) for op, name in ALL if "cpu" in PEERS[op][name].devices]
LOSSES = ("info_nce", "sigmoid_contrastive")


def function(op: str, name: str) -> Function:
    loaded, version = installed(PEERS[op][name])
    if loaded is None:
        pytest.skip(version)
    return loaded


def numbers(of: Function, arguments: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradients of its sum with a weight for each element."""
    output = of(**arguments)
    leaves = [given for given in arguments.values() if isinstance(given, Tensor) and given.requires_grad]
    weight = torch.linspace(0.5, 1.5, output.numel(), device=output.device).view(output.shape)
    return [output, *torch.autograd.grad((output * weight).sum(), leaves)]


def disagreement(of: Function, op: str, shape: Any = None, dtype: torch.dtype = torch.float32) -> float:
    """The largest error of the output and of the gradients against float64, relative to each one's norm."""
    workload = WORKLOADS[op]
    arguments = workload.make_inputs(shape or workload.parity, dtype=dtype, device="cpu")
    exact = {
        name: given.detach().double().requires_grad_(given.requires_grad)
        if isinstance(given, Tensor)
        else given
        for name, given in arguments.items()
    }
    truth = numbers(lambda **given: workload.ours(**given, backend="reference"), exact)
    found = numbers(of, arguments)
    for leaf, gradient in zip(
        (g for g in arguments.values() if isinstance(g, Tensor)), found[1:], strict=True
    ):
        assert gradient.shape == leaf.shape
    return max(
        float((f.detach().double() - t.detach()).norm() / t.detach().norm())
        for f, t in zip(found, truth, strict=True)
    )


@pytest.mark.parametrize(("op", "name"), ALL)
def test_contract(op: str, name: str) -> None:
    peer = PEERS[op][name]
    assert op in WORKLOADS and name not in {*WORKLOADS[op].peers, "compile"}
    assert re.fullmatch(r"[a-z0-9_]+", name)
    assert peer.devices and set(peer.devices) <= {"cpu", "cuda"}
    assert peer.passes and set(peer.passes) <= {"forward", "forward+backward"}
    assert peer.dtypes is None or all(dtype.is_floating_point for dtype in peer.dtypes)
    assert peer.why and "\n" not in peer.why


def test_libraries_are_declared_and_pinned() -> None:
    listed = {peer.library for peers in PEERS.values() for peer in peers.values()} - set(INSTALLED_OTHERWISE)
    extra = re.search(r"^peers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert extra is not None and set(re.findall(r'^  "(.+?)"', extra[1], re.MULTILINE)) == listed
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints-bench.txt").read_text(), re.MULTILINE))
    assert listed <= set(pinned)
    page = (ROOT / "docs" / "benchmark_peers.md").read_text()
    for library in listed:
        assert f"{library} {pinned[library]}" in page


def test_every_peer_has_its_line_in_the_page() -> None:
    page = (ROOT / "docs" / "benchmark_peers.md").read_text()
    assert {name for _, name in ALL} <= set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))


def test_what_is_missing_is_named() -> None:
    absent = Peer("no-such-library", lambda: pytest.fail("loaded what is not installed"))
    assert installed(absent) == (None, "no-such-library is not installed: make peers")


@pytest.mark.parametrize(
    "error", [ImportError("no kernels\nand more"), OSError("no kernels"), KeyError("no kernels")]
)
def test_what_fails_to_load_is_reported(error: Exception) -> None:
    def load() -> Function:
        raise error

    found, reason = installed(Peer("torch", load))
    assert found is None
    assert reason.startswith(f"torch {torch.__version__} cannot be used: {type(error).__name__}: ")
    assert "no kernels" in reason and "\n" not in reason


def test_what_loads_comes_with_its_version() -> None:
    assert installed(Peer("torch", lambda: max)) == (max, torch.__version__)


def test_one_file_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator does not exist')")
    (package / "loss.py").write_text("VALUE = object()")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = _source.module("broken_package", "loss.py")
    assert _source.module("broken_package", "loss.py") is loaded and "broken_package" not in sys.modules
    with pytest.raises(ImportError, match="broken_package has no other.py"):
        _source.module("broken_package", "other.py")
    with pytest.raises(ImportError, match="no package absent_package"):
        _source.module("absent_package", "loss.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "name"), ON_CPU)
def test_computes_the_same(op: str, name: str, dtype: torch.dtype) -> None:
    assert disagreement(function(op, name), op, dtype=dtype) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("op", "name"), ON_CPU)
def test_forward_alone(op: str, name: str) -> None:
    """Arguments without gradients, as a forward is timed; the same arguments still give the same number afterwards."""
    peer, workload = function(op, name), WORKLOADS[op]
    arguments = workload.make_inputs(workload.parity, dtype=torch.float32, device="cpu")
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    alone = peer(**detached)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, peer(**arguments).detach())


@pytest.mark.parametrize(("op", "name"), [pair for pair in ALL if pair[0] in LOSSES])
def test_refuses_rows_without_a_partner(op: str, name: str) -> None:
    peer, workload = function(op, name), WORKLOADS[op]
    arguments = workload.make_inputs(workload.parity._replace(rows=4, columns=3), device="cpu")
    with pytest.raises(NotImplementedError, match="as many rows of x as of y, got 4 and 3"):
        peer(**arguments)


def test_both_ways() -> None:
    """Rows and classes, their order and the scale's gradient, without any library."""
    assert disagreement(contrastive._both_ways(cross_entropy), "info_nce") < 1e-5
    skewed = contrastive._both_ways(
        lambda rows, classes, target: cross_entropy(rows, classes.roll(1, 0), target)
    )
    assert disagreement(skewed, "info_nce") > 1e-2


@pytest.mark.parametrize("op", ["max_sim", "gumbel_assign"])
def test_no_choice_of_the_parity_shape_is_close(op: str) -> None:
    """The best of the items is ahead of the second by more than rounding both to bfloat16 may take from it."""
    workload = WORKLOADS[op]
    given = workload.make_inputs(workload.parity, dtype=torch.bfloat16, device="cpu")
    exact = {name: value.detach().double() for name, value in given.items() if isinstance(value, Tensor)}
    if op == "max_sim":
        scores = torch.einsum("brd,ctd->bctr", exact["regions"], exact["words"])
    else:
        scores = (exact["keys"] @ exact["queries"].mT * exact["scale"]).softmax(2)
    best, second = scores.topk(2, -1).values.unbind(-1)
    ahead = float(((best - second) / best.abs()).min())
    assert ahead > torch.finfo(torch.bfloat16).eps


def cross_entropy(rows: Tensor, classes: Tensor, target: Tensor, *_: Any, **__: Any) -> Tensor:
    return F.cross_entropy(rows @ classes.T, target)


def max_sim(queries: Tensor, documents: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.einsum("qtd,brd->qbtr", queries.float(), documents.float()).amax(3).sum(2)


def inf_cl(q: Tensor, k: Tensor, labels: Tensor, scale: Tensor, head_dim: int) -> Tensor:
    assert q.shape[1] % head_dim == 0 and head_dim & (head_dim - 1) == 0
    return F.cross_entropy(scale * q @ k.T, labels, reduction="none")


def liger(_: Any, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: None = None) -> Tensor:
    return cross_entropy(_input, lin_weight, target)


def per_row(_: Any, rows: Tensor, classes: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(rows @ classes.T, target, reduction="none")


FLASH = "flash_maxsim.flash_maxsim_batched_train"
SM90 = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
BEHIND: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "inf_cl": ("inf_cl", "cal_flash_loss", inf_cl),
    "cut_cross_entropy": ("cut_cross_entropy", "linear_cross_entropy", cross_entropy),
    "cut_cross_entropy_filtered": ("cut_cross_entropy", "linear_cross_entropy", cross_entropy),
    "liger": (
        "liger_kernel.transformers.fused_linear_cross_entropy",
        "LigerFusedLinearCrossEntropyLoss.forward",
        liger,
    ),
    "liger_sm90": (SM90, "LigerFusedScaledCrossEntropySM90Function.forward", per_row),
    "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", cross_entropy),
    "flash_maxsim": ("flash_maxsim", "flash_maxsim_batched_train", max_sim),
    "flash_maxsim_invgrid": (
        "flash_maxsim.flash_maxsim_invgrid_proposal",
        "flash_maxsim_invgrid_train",
        max_sim,
    ),
    "late_interaction_kernels": ("late_interaction_kernels", "maxsim", max_sim),
    "late_interaction_kernels_lowmem": ("late_interaction_kernels", "maxsim", max_sim),
}
"""Where the function of each library lies that needs a GPU, and its documented mathematics."""


def test_every_library_for_a_gpu_is_stood_in_for() -> None:
    assert {name for op, name in ALL if (op, name) not in ON_CPU} == set(BEHIND)


@pytest.mark.parametrize("name", BEHIND)
def test_calls_the_library_as_its_signature_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = next(op for op in PEERS if name in PEERS[op])
    function(op, name)
    path, attribute, mathematics = BEHIND[name]
    place: Any = importlib.import_module(path)
    *owner, last = attribute.split(".")
    for part in owner:
        place = getattr(place, part)
    real = getattr(place, last)
    if name == "liger_sm90":
        # An autograd function: what is called is `apply`, whose arguments are those of `forward` after the context.
        signature = inspect.signature(real)
        monkeypatch.setattr(
            place, "apply", lambda *given: (signature.bind(None, *given), mathematics(None, *given))[1]
        )
    else:
        monkeypatch.setattr(place, last, create_autospec(real, side_effect=mathematics))
    half = name == "flash_maxsim_invgrid"
    assert disagreement(function(op, name), op) < (1e-3 if half else 1e-5)
    if name == "flash_maxsim":
        forward = create_autospec(
            importlib.import_module("flash_maxsim").flash_maxsim_batched, side_effect=max_sim
        )
        monkeypatch.setattr("flash_maxsim.flash_maxsim_batched", forward)
        peer, workload = function(op, name), WORKLOADS[op]
        with torch.no_grad():
            scores = peer(**workload.make_inputs(workload.parity, device="cpu"))
        assert scores.shape == workload.parity[:2] and forward.call_count == 1


def test_refuses_what_inf_cl_would_get_wrong() -> None:
    peer, make_inputs = function("info_nce", "inf_cl"), WORKLOADS["info_nce"].make_inputs
    for rows, width in ((96, 64), (128, 24)):
        with pytest.raises(NotImplementedError, match="multiples of 64 and widths in multiples of 16"):
            peer(
                **make_inputs(
                    WORKLOADS["info_nce"].parity._replace(rows=rows, columns=rows, width=width), device="cpu"
                )
            )


def test_refuses_what_quack_cannot_align() -> None:
    peer, make_inputs = function("info_nce", "quack"), WORKLOADS["info_nce"].make_inputs
    for rows, width in ((20, 64), (64, 20)):
        with pytest.raises(NotImplementedError, match="multiples of 8, got"):
            peer(
                **make_inputs(
                    WORKLOADS["info_nce"].parity._replace(rows=rows, columns=rows, width=width), device="cpu"
                )
            )


INTERPRETED = ("cut_cross_entropy", "cut_cross_entropy_filtered", "flash_maxsim", "flash_maxsim_invgrid", "inf_cl",
               "late_interaction_kernels", "late_interaction_kernels_lowmem", "liger")  # fmt: skip
"""Those whose kernels Triton's interpreter can run: not CuTe's."""


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_in_the_interpreter(name: str) -> None:
    """In a process of its own, since Triton looks at TRITON_INTERPRET when it is imported."""
    op = next(op for op in PEERS if name in PEERS[op])
    function(op, name)
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_benchmark_peers import interpret; interpret({op!r}, {name!r})"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def interpret(op: str, name: str) -> None:
    """Hold one peer's own kernels against float64, with what they ask of a GPU answered for them."""
    import triton
    import triton.language as tl
    from triton.runtime.autotuner import Autotuner

    patched: Any = Autotuner
    patched._bench = lambda *_, **__: [1.0]  # the first configuration: there is nothing to time
    patched.check_disk_cache = lambda _, key, configs, benchmark: benchmark()
    library: Any = torch.Tensor
    library.is_cuda = property(lambda _: True)
    language: Any = tl
    language.inline_asm_elementwise = lambda code, constraints, given, **_: given[0]  # rounding to TF32
    if name.startswith("cut_cross_entropy"):
        log_plus_one: Any = importlib.import_module("cut_cross_entropy.tl_utils")
        exec("def tl_log1p(x):\n    return tl.log(1.0 + x)", source := {"tl": tl})
        log_plus_one.tl_log1p = source["tl_log1p"]
    if name.startswith("flash_maxsim"):
        importlib.import_module("flash_maxsim")
        sys.modules[FLASH].__dict__["_bwd_unified_arch"] = lambda _: "other"
    assert triton.knobs.runtime.interpret
    loaded, reason = installed(PEERS[op][name])
    assert loaded is not None, reason
    shape = WORKLOADS[op].parity
    shape = shape._replace(rows=64, columns=64, width=32) if op == "info_nce" else shape
    half = torch.float16 in (PEERS[op][name].dtypes or ())
    error = disagreement(loaded, op, shape, torch.float16 if half else torch.float32)
    assert error < (2e-3 if half else 1e-5), error
