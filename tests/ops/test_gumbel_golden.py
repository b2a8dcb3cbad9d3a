"""Golden values of the Gumbel ops: GroupViT's assignment, and the known answers of Philox4x32-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import Assignment, _extension, gumbel_assign
from jrl_kernels.ops.gumbel import reference
from tests.ops.conformance import BACKENDS, det

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
PRECISE = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
    for case in BACKENDS
    for dtype in TOLERANCE
    if not (case.id == "triton" and dtype == torch.float64)
]

# Counter, key and words, from the authors' own tests of the generator.
KNOWN_ANSWERS = (
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
)


def assign_attention(device: str, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Assignment]:
    """GroupViT's AssignAttention in evaluation: four linear layers around the op."""
    shapes = {f"{layer}.{kind}": (6,) if kind == "b" else (6, 6) for layer in "kpqv" for kind in "bw"}
    weights = {
        name: det(*shape, a=0.11 * (n + 1)).to(device, dtype)
        for n, (name, shape) in enumerate(shapes.items())
    }

    def layer(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.w"], weights[f"{name}.b"])

    groups, segments = (
        det(*shape, a=a).to(device, dtype) for shape, a in (((2, 3, 6), 0.37), ((2, 5, 6), 0.53))
    )
    found = gumbel_assign(
        layer("q", groups), layer("k", segments), layer("v", segments), noise=False, eps=1.0, return_soft=True, **options
    )  # fmt: skip
    return layer("p", found.pooled), found


def assert_group_vit(out: Tensor, found: Assignment, tolerance: float) -> None:
    assert float(out.sum()) == pytest.approx(32.7501292845, rel=tolerance)
    row = [0.81424944, 2.97104302, -3.78912414, 6.72161766, -4.46648064, 4.74525383]
    assert out[0, 1].tolist() == pytest.approx(row, rel=max(tolerance, 1e-8))
    assert found.index[0].tolist() == [1, 0, 1, 0, 1]  # the third group is empty
    assert not found.pooled[0, 2].any()
    assert found.soft is not None
    soft = [
        [0.0147923, 0.70515751, 0.01463851, 0.72070743, 0.01477428],
        [0.94379261, 0.03650537, 0.94047692, 0.03744402, 0.93593044],
        [0.04141509, 0.25833713, 0.04488457, 0.24184855, 0.04929528],
    ]
    torch.testing.assert_close(
        found.soft[0].double().cpu(), torch.tensor(soft).double(), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize(("backend", "device", "dtype"), PRECISE)
@pytest.mark.parametrize("scale", [None, 6**-0.5])
def test_group_vit(backend: str, device: str, dtype: torch.dtype, scale: float | None) -> None:
    out, found = assign_attention(device, dtype, scale=scale, backend=backend)
    assert_group_vit(out, found, TOLERANCE[dtype])


def test_known_answers_of_the_reference() -> None:
    counters, keys, words = (torch.tensor(rows) for rows in zip(*KNOWN_ANSWERS, strict=True))
    found = reference.philox(tuple(counters.T), (keys[:, 0], keys[:, 1]))
    assert torch.equal(torch.stack(found, dim=1), words)


def as_words(rows: Any) -> Tensor:
    return torch.tensor(rows).to(torch.uint32).contiguous()


@pytest.mark.skipif(not _extension.available("philox_words_cpu"), reason="the extension is not built")
def test_known_answers_of_the_extension() -> None:
    counters, keys, words = (as_words(rows) for rows in zip(*KNOWN_ANSWERS, strict=True))
    found = torch.empty_like(words)
    _extension.launch(
        "philox_words_cpu", counters.data_ptr(), keys.data_ptr(), len(counters), found.data_ptr()
    )
    assert torch.equal(found.long(), words.long())


def noise_of(elements: Tensor, seed: int, stream: int) -> Tensor:
    """Gumbel noise in float64, element by element, from the words that the reference's generator gives."""
    block, zero = elements >> 2, torch.zeros_like(elements)
    key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)
    words = torch.stack(reference.philox((block & 0xFFFFFFFF, block >> 32, zero + stream, zero), key), dim=-1)
    bits = words.gather(-1, (elements & 3)[..., None])[..., 0]
    return -(-(((bits >> 9).double() + 0.5) / 2**23).log()).log()


@pytest.mark.skipif(not _extension.available("philox_words_cpu"), reason="the extension is not built")
def test_noise_beyond_32_bits_of_elements() -> None:
    """Rows so far down that the counter needs its second word."""
    codes, first_row, seed = 11, (1 << 34) + 3, (0xABCD1234 << 31) + 77
    for dtype, suffix in ((torch.float64, "f64"), (torch.float32, "f32")):
        z, total = torch.zeros(2, codes, dtype=dtype), torch.zeros(2, dtype=dtype)
        key = torch.tensor(seed)
        _extension.launch(
            f"gumbel_embed_probabilities_{suffix}_cpu",
            z.data_ptr(), 2, codes, first_row, key.data_ptr(), 1.0, total.data_ptr(),
        )  # fmt: skip
        elements = (first_row + torch.arange(2))[:, None] * codes + torch.arange(codes)
        torch.testing.assert_close(z.log().double(), noise_of(elements, seed, 1), rtol=0, atol=2e-6)
