"""Which backend a call of the contrastive losses gets, and every error message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jrl_kernels import info_nce, info_nce_from_scores, sigmoid_contrastive

SPARSE_IS_NEW = "ignore:Sparse CSR tensor support:UserWarning"


class TestDispatch:
    def test_auto_on_a_cpu_is_the_extension(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from jrl_kernels import _dispatch

        monkeypatch.delenv("JRL_BACKEND", raising=False)
        x = torch.randn(2, 2)
        assert _dispatch.select("info_nce", "auto", "info_nce", x) == "cpu"
        monkeypatch.setenv("JRL_BACKEND", "cudnn")
        with pytest.raises(ValueError, match="info_nce: JRL_BACKEND must be 'auto' or one of .*got 'cudnn'"):
            info_nce(X, X)
        monkeypatch.setenv("JRL_BACKEND", "reference")
        assert _dispatch.select("info_nce", "auto", "info_nce", x) == "reference"
        assert _dispatch.select("info_nce", "cpu", "info_nce", x) == "cpu"

    def test_without_the_extension_auto_is_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from jrl_kernels import _dispatch, _extension

        monkeypatch.setattr(
            _extension, "unavailable", lambda launcher=None: ("it has not been built", "pip install .")
        )
        x = torch.randn(2, 2)
        assert _dispatch.select("info_nce", "auto", "info_nce", x) == "reference"
        with pytest.raises(
            NotImplementedError, match=r"backend 'cpu' it has not been built \(pip install \.\)"
        ):
            _dispatch.select("info_nce", "cpu", "info_nce", x)

    def test_a_gpu_tensor_never_falls_back_to_the_reference(self) -> None:
        from jrl_kernels import _dispatch

        with pytest.raises(NotImplementedError) as error:
            _dispatch._select("info_nce", "auto", "info_nce", "cuda", torch.float64)
        assert "triton: " in str(error.value) and "reference: never chosen" in str(error.value)

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*'cpu'.*got 'cudnn'"):
            info_nce(torch.randn(2, 2), torch.randn(2, 2), backend="cudnn")


X = torch.randn(4, 3)


LONG = torch.zeros(4, dtype=torch.int64)


@pytest.mark.filterwarnings(SPARSE_IS_NEW)
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "x must be a tensor, got float 1.0"),
        ((X.long(), X), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((X[0], X), {}, ValueError, r"x must have shape \[rows, columns\], got \[3\]"),
        ((X, X[:, :2]), {}, ValueError, r"y must have shape \[rows, 3\], got \[4, 2\]"),
        ((X, X.double()), {}, TypeError, "y must be torch.float32 like x, got torch.float64"),
        ((X, X.to("meta")), {}, ValueError, "y must be on cpu like x, got meta"),
        ((X, X), {"negatives": X[:, :2]}, ValueError, r"negatives must have shape \[rows, 3\], got \[4, 2\]"),
        ((X, X), {"negatives": X.half()}, TypeError, "negatives must be torch.float32 like x"),
        ((X, X), {"scale": "10"}, TypeError, "scale must be a number or a 0-d tensor, got str '10'"),
        ((X, X), {"scale": X}, ValueError, r"scale must be a 0-d tensor or a number, got shape \[4, 3\]"),
        (
            (X, X),
            {"scale": LONG[0]},
            TypeError,
            "scale must be a floating 0-d tensor or a number, got torch.int64",
        ),
        ((X, X), {"bias": True}, TypeError, "bias must be a number or a 0-d tensor, got bool True"),
        (
            (X, X),
            {"direction": "up"},
            ValueError,
            r"direction must be one of \['both', 'x_to_y', 'y_to_x'\], got 'up'",
        ),
        ((X, X), {"multi_positive": "max"}, ValueError, "multi_positive must be one of"),
        ((X, X), {"reduction": "avg"}, ValueError, "reduction must be one of"),
        ((X, X), {"positives": "diagonal"}, TypeError, "positives must be None, an int64 index per row"),
        ((X, X), {"positives": LONG.int()}, TypeError, "positives must be int64, got torch.int32"),
        ((X, X), {"positives": LONG[:3]}, ValueError, r"positives must have shape \[4\], got \[3\]"),
        ((X, X), {"positives": LONG + 4}, ValueError, r"positives must hold row indices of y in \[0, 4\)"),
        ((X, X), {"positives": LONG - 1}, ValueError, r"positives must hold row indices of y in \[0, 4\)"),
        ((X, X), {"positives": (LONG,)}, ValueError, "positives as ids must be a pair"),
        (
            (X, X),
            {"positives": (LONG, LONG[:2])},
            ValueError,
            r"positives\[1\] must have shape \[4\], got \[2\]",
        ),
        ((X, X), {"positives": torch.eye(4) > 0}, ValueError, "dense matrix is not taken"),
        ((X, X), {"positives": torch.eye(4).to_sparse_csr()}, TypeError, "sparse matrix must be boolean"),
        ((X, X), {"positives": (torch.eye(4) > 0).to_sparse()}, TypeError, "must be CSR"),
        (
            (X, X[:2]),
            {"positives": (torch.eye(4) > 0).to_sparse_csr()},
            ValueError,
            r"shape \[4, 2\], got \[4, 4\]",
        ),
        (
            (X, X),
            {
                "positives": torch.sparse_csr_tensor(
                    [0, 2, 2, 2, 2], [1, 1], [True, True], (4, 4), check_invariants=False
                )
            },
            ValueError,
            "must increase strictly",
        ),
        (
            (X, X),
            {"positives": torch.sparse_csr_tensor([0, 1, 1, 1, 1], [1], [False], (4, 4))},
            ValueError,
            "got a stored False",
        ),
        ((X, X[:2]), {"exclude": LONG}, ValueError, "exclude as one tensor needs as many rows as columns"),
        (
            (X, X),
            {"exclude": (LONG, LONG, LONG)},
            ValueError,
            "exclude has ids for negatives, but negatives is None",
        ),
        ((X, X), {"exclude": 3}, TypeError, "exclude must be int64 ids or a pair"),
        ((X, X), {"exclude": (LONG, LONG.int())}, TypeError, r"exclude\[1\] must be int64, got torch.int32"),
        ((X, X), {"weights": LONG}, TypeError, "weights must be a floating tensor, got torch.int64"),
        ((X, X), {"weights": X[:, 0][:2]}, ValueError, r"weights must have shape \[4\], got \[2\]"),
        ((X, X), {"weights": (X[:, 0],)}, ValueError, r"weights must be \[M\] or a pair"),
        ((X, X), {"weights": X[:, 0], "positives": (LONG, LONG)}, ValueError, "must be a pair"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^info_nce: .*{message}"):
        info_nce(*arguments, **options)


def test_messages_of_the_others() -> None:
    with pytest.raises(TypeError, match=r"^sigmoid_contrastive: y must be torch.float32 like x"):
        sigmoid_contrastive(X, X.half(), scale=1.0, bias=0.0)
    with pytest.raises(ValueError, match=r"^sigmoid_contrastive: positives must hold row indices"):
        sigmoid_contrastive(X, X, scale=1.0, bias=0.0, positives=LONG + 9)
    with pytest.raises(ValueError, match=r"^info_nce_from_scores: scores must have shape"):
        info_nce_from_scores(X[0])
    with pytest.raises(ValueError, match=r"^info_nce_from_scores: exclude has ids for negatives"):
        info_nce_from_scores(X, exclude=(LONG, LONG[:3], LONG))
