"""Our ClipLoss, SigLipLoss and CoCaLoss against open_clip's, alone and in its training loop."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels.integrations import open_clip as ours
from tests.hosts.compare import memory, numbers, same

open_clip = pytest.importorskip("open_clip", reason="needs open_clip; make test installs it")
from open_clip import loss as theirs  # noqa: E402
from open_clip_train.train import train_one_epoch  # noqa: E402

WIDTH = {"layers": 1, "width": 32}
TEXT = {**WIDTH, "context_length": 8, "vocab_size": 40, "heads": 2}
IMAGE = {**WIDTH, "image_size": 16, "patch_size": 8, "head_width": 16}


def features(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images, texts = (F.normalize(numbers(seed, rows, 24, dtype=dtype), dim=1) for seed in (1, 2))
    return images, texts


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_clip_loss() -> None:
    inputs = *features(13), scalar(17.0)
    same(ours.ClipLoss(), theirs.ClipLoss(), inputs)
    same(ours.ClipLoss(), theirs.ClipLoss(cache_labels=True), (*inputs, scalar(-3.0)))
    given = ours.ClipLoss()(*inputs, output_dict=True)
    assert given.keys() == theirs.ClipLoss()(*inputs, output_dict=True).keys()


@pytest.mark.parametrize("dist_impl", [None, "gather"])
def test_siglip_loss(dist_impl: str | None) -> None:
    inputs = *features(13), scalar(17.0), scalar(-6.0)
    same(ours.SigLipLoss(dist_impl=dist_impl), theirs.SigLipLoss(dist_impl=dist_impl), inputs)
    host = theirs.SigLipLoss()(*features(5), 10.0, None, output_dict=True)
    found = ours.SigLipLoss()(*features(5), 10.0, None, output_dict=True)
    assert found.keys() == host.keys()
    assert torch.allclose(found["contrastive_loss"], host["contrastive_loss"])


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0)])
def test_coca_loss(weights: tuple[float, float]) -> None:
    labels = torch.randint(0, 11, (13, 7), generator=torch.Generator().manual_seed(3))  # 0 is padding
    inputs = *features(13), numbers(4, 13, 7, 11), scalar(17.0)

    def total(loss: Any) -> Any:
        def run(images: Tensor, texts: Tensor, logits: Tensor, scale: Tensor) -> Tensor:
            pair = loss(images, texts, logits, labels, scale)
            named = loss(images, texts, logits, labels, scale, output_dict=True)
            assert list(named) == ["contrastive_loss", "caption_loss"]
            assert torch.equal(named["caption_loss"], pair[1])
            return pair[0] + pair[1]

        return run

    same(total(ours.CoCaLoss(*weights)), total(theirs.CoCaLoss(*weights)), inputs)


def test_the_signatures_are_the_hosts() -> None:
    for name in ("ClipLoss", "SigLipLoss", "CoCaLoss"):
        for method in ("__init__", "forward"):
            mine, host = (
                {
                    n: p.default
                    for n, p in inspect.signature(getattr(getattr(m, name), method)).parameters.items()
                }
                for m in (ours, theirs)
            )
            if name == "SigLipLoss" and method == "forward":
                mine["logit_bias"] = host["logit_bias"]  # ours may be left out
            assert list(mine.items()) == list(host.items())


def test_half_precision_is_nearer_to_the_truth() -> None:
    images, texts = (t.bfloat16() for t in features(64))
    exact = theirs.ClipLoss()(images.double(), texts.double(), scalar(50.0))
    with torch.autocast("cpu", torch.bfloat16):
        given = images, texts, torch.tensor(50.0)
        ours_off, theirs_off = (abs(float(m.ClipLoss()(*given)) - float(exact)) for m in (ours, theirs))
    assert ours_off < 1e-5 < theirs_off


def test_memory() -> None:
    images, texts = features(2048, torch.float32)
    scale = torch.tensor(20.0)
    matrix = 2048 * 2048 * 4
    assert memory(theirs.ClipLoss(), images, texts, scale) > 3 * matrix
    assert memory(ours.ClipLoss(), images, texts, scale) < matrix / 2
    bias = torch.tensor(-10.0)
    assert memory(theirs.SigLipLoss(), images, texts, scale, bias) > 3 * matrix
    assert memory(ours.SigLipLoss(), images, texts, scale, bias) < matrix


class Loader(list[Any]):
    num_batches, num_samples = 3, 24


def clip(**options: Any) -> Any:
    return open_clip.CLIP(embed_dim=16, vision_cfg=IMAGE, text_cfg=TEXT, output_dict=True, **options)


def coca() -> Any:
    image = {
        **IMAGE,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 4,
        "output_tokens": True,
    }
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = open_clip.CoCa(embed_dim=32, vision_cfg=image, text_cfg=text, multimodal_cfg=TEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the host leaves one as its memory was
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    ("build", "loss", "arguments", "accumulate"),
    [
        (clip, "ClipLoss", (), 1),
        (clip, "ClipLoss", (), 3),
        (lambda: clip(init_logit_bias=-4.0), "SigLipLoss", (), 1),
        (lambda: clip(init_logit_bias=-4.0), "ClipLoss", (), 1),
        (coca, "CoCaLoss", (2.0, 1.0), 1),
    ],
    ids=["clip", "clip-accumulated", "siglip", "clip-with-bias", "coca"],
)
def test_the_hosts_training_loop(
    build: Any, loss: str, arguments: tuple[float, ...], accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = {name: mock.Mock(wraps=getattr(ours, name)) for name in ("info_nce", "sigmoid_contrastive")}
    for name, function in fused.items():
        monkeypatch.setattr(ours, name, function)
    torch.manual_seed(0)
    start = build()
    source = torch.Generator().manual_seed(5)
    batches = Loader(
        (torch.randn(8, 3, 16, 16, generator=source), torch.randint(1, 39, (8, 8), generator=source))
        for _ in range(3)
    )
    data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
    options = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=accumulate, skip_scheduler=True, horovod=False,
        grad_clip_norm=None, rank=0, local_rank=0, world_size=1, batch_size=8, log_every_n_steps=1, wandb=False,
    )  # fmt: skip
    logs, weights = {}, {}
    for name, module in (("theirs", theirs), ("ours", ours)):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        written: list[tuple[str, float]] = []
        writer = SimpleNamespace(add_scalar=lambda key, value, step, w=written: w.append((key, value)))
        criterion = getattr(module, loss)(*arguments)
        train_one_epoch(model, data, criterion, 0, optimizer, None, None, None, options, tb_writer=writer)
        logs[name] = {
            (place, key): value
            for place, (key, value) in enumerate(written)
            if "loss" in key or "scale" in key
        }
        weights[name] = model.state_dict()
    assert logs["ours"] == pytest.approx(logs["theirs"], rel=1e-4)
    assert len(logs["ours"]) >= 2
    assert sum(function.call_count for function in fused.values()) >= 3, "a loss a batch"
    moved = 0.0
    for key, truth in weights["theirs"].items():
        assert torch.allclose(weights["ours"][key], truth, atol=2e-6), key
        moved = max(
            moved, float((truth.double() - start.state_dict()[key].double()).nan_to_num().abs().max())
        )
    assert moved > 1e-3


def test_a_row_needs_a_partner() -> None:
    for rows, columns in ((6, 4), (4, 6)):
        inputs = features(6)[0][:rows], features(6)[1][:columns], scalar(9.0)
        for host, loss in ((theirs.ClipLoss(), ours.ClipLoss()), (theirs.SigLipLoss(), ours.SigLipLoss())):
            more = (scalar(0.0),) if "SigLip" in type(loss).__name__ else ()
            with pytest.raises((IndexError, ValueError, RuntimeError)):
                host(*inputs, *more)
            with pytest.raises(ValueError, match=f"the same number of rows, got {rows} and {columns}"):
                loss(*inputs, *more)


def test_messages() -> None:
    with pytest.raises(NotImplementedError, match="Horovod"):
        ours.ClipLoss(world_size=2, use_horovod=True)
    with pytest.raises(
        ValueError, match="dist_impl must be bidir, shift, reduce, gather or None, got 'ring'"
    ):
        ours.SigLipLoss(dist_impl="ring")
    with pytest.raises(RuntimeError, match="world_size is 2, but torch.distributed is not initialised"):
        ours.ClipLoss(world_size=2)(*features(3), 1.0)
