"""cached_step against the step whose graphs are all kept."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.measure import extra_memory
from jrl_kernels import cached_step, distributed, info_nce, info_nce_from_scores, max_sim, sigmoid_contrastive

ROWS, WIDTH = 11, 6


class Tower(nn.Module):
    """Dropout before and after a layer, so that its masks depend on where in the stream they are drawn."""

    def __init__(self, dropout: float = 0.4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Pair(nn.Module):
    def __init__(self, dropout: float = 0.4, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = Tower(dropout).to(dtype), Tower(dropout).to(dtype)
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=dtype))


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    first, second = (torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype) for _ in range(2))
    return first, second


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def uncached(model: Any, given: tuple[Tensor, Tensor], loss: Callable[..., Any], size: int) -> Tensor:
    """The same chunks, with all of their graphs kept."""
    x, y = (
        torch.cat([tower(part) for part in data.split(size)])
        for tower, data in zip((model.image, model.text), given, strict=True)
    )
    result = loss(x, y)
    value: Tensor = result[0] if isinstance(result, tuple) else result
    value.backward()
    return value.detach()


def agree(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == truth.keys() and truth
    for name, wanted in truth.items():
        assert float((found[name] - wanted).abs().max()) <= tolerance * max(
            float(wanted.abs().max()), 1e-3
        ), name


LOSSES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "info_nce": lambda m: lambda x, y: info_nce(x, y, scale=m.scale.exp(), normalize=True),
    "statistics": lambda m: lambda x, y: info_nce(x, y, scale=m.scale.exp(), return_stats=True),
    "sigmoid": lambda m: lambda x, y: sigmoid_contrastive(x, y, scale=m.scale.exp(), bias=m.bias),
    "one side": lambda m: lambda x, y: info_nce(x, y.detach(), scale=m.scale.exp()),
}


@pytest.mark.parametrize("size", [1, 4, 11, 50])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_uncached_steps(name: str, size: int) -> None:
    model, given = Pair(), inputs(ROWS, WIDTH)
    if name == "one side":
        model.text.requires_grad_(False)
    reference = copy.deepcopy(model)
    torch.manual_seed(7)
    truth = uncached(reference, given, LOSSES[name](reference), size)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    found = cached_step((model.image, model.text), given, LOSSES[name](model), chunk_size=size)
    assert torch.equal(torch.get_rng_state(), state), "the stream of random numbers goes on as it would"
    if isinstance(found, tuple):
        assert found[1].accuracy_x_to_y is not None
        found = found[0]
    assert not found.requires_grad and torch.allclose(found, truth, rtol=1e-12)
    agree(grads(model), grads(reference))


def test_without_randomness_it_is_the_step_of_the_whole_batch() -> None:
    model, given = Pair(dropout=0.0), inputs(ROWS, WIDTH)
    reference = copy.deepcopy(model)
    truth = uncached(reference, given, LOSSES["info_nce"](reference), ROWS)
    for _ in range(2):  # gradients are added up
        found = cached_step((model.image, model.text), given, LOSSES["info_nce"](model), chunk_size=(3, 5))
    assert torch.allclose(found, truth, rtol=1e-12)
    agree(grads(model), {name: 2 * g for name, g in grads(reference).items()})


def test_outputs_and_inputs_of_several_tensors() -> None:
    """Regions and words of late interaction: keywords, a mask, something that is not a tensor."""
    model = Pair()
    regions, words = inputs(ROWS, 3, WIDTH)
    mask = torch.arange(3) < torch.tensor([1, 2, 3]).repeat(4)[:ROWS, None]

    def text(words: Tensor, mask: Tensor, name: str) -> dict[str, Any]:
        assert name == "kept" and len(words) == len(mask) <= 4
        return {"words": model.text(words), "mask": mask, "name": name}

    def image(regions: Tensor, factor: float) -> Tensor:
        out: Tensor = model.image(regions) * factor
        return out

    def loss(regions: Tensor, text: dict[str, Any]) -> Tensor:
        assert text["name"] == "kept" and text["mask"].dtype == torch.bool
        scores = max_sim(regions, text["words"], word_mask=text["mask"])
        value: Tensor = info_nce_from_scores(scores, scale=model.scale)
        return value

    torch.manual_seed(3)
    given = (regions, 2.0), {"words": words, "mask": mask, "name": "kept"}
    found = cached_step([image, text], given, loss, chunk_size=4)
    first = grads(model)
    model.zero_grad()
    torch.manual_seed(3)
    x = torch.cat([image(part, 2.0) for part in regions.split(4)])
    y = torch.cat([model.text(part) for part in words.split(4)])
    truth = loss(x, {"words": y, "mask": mask, "name": "kept"})
    truth.backward()
    assert torch.allclose(found, truth, rtol=1e-12)
    agree(first, grads(model))


def test_one_encoder() -> None:
    """Two views of a batch through one network, and its input learns too."""
    model, (views, _) = Pair(), inputs(2 * ROWS, WIDTH)
    views.requires_grad_()
    positives = torch.arange(2 * ROWS).roll(ROWS)
    ids = torch.arange(2 * ROWS)

    def loss(z: Tensor) -> Tensor:
        value: Tensor = info_nce(z, z, positives=positives, exclude=ids, normalize=True, direction="x_to_y")
        return value

    torch.manual_seed(5)
    found = cached_step(model.image, views, loss, chunk_size=5)
    first, first_views = grads(model), views.grad
    model.zero_grad()
    views.grad = None
    torch.manual_seed(5)
    truth = loss(torch.cat([model.image(part) for part in views.split(5)]))
    truth.backward()
    assert torch.allclose(found, truth, rtol=1e-12)
    assert first_views is not None and views.grad is not None
    agree({**first, "views": first_views}, {**grads(model), "views": views.grad})


def test_autocast() -> None:
    """Casts that were cached in the pass without a graph would leave the weights without gradients."""
    model, given = Pair(dtype=torch.float32), inputs(ROWS, WIDTH, dtype=torch.float32)
    reference = copy.deepcopy(model)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        truth = uncached(reference, given, LOSSES["info_nce"](reference), 4)
        torch.manual_seed(2)
        found = cached_step((model.image, model.text), given, LOSSES["info_nce"](model), chunk_size=4)
        assert torch.is_autocast_enabled("cpu")
    assert torch.allclose(found, truth, rtol=1e-6)
    # the chunks' gradients of a weight are rounded to bfloat16 before they are added up
    agree(grads(model), grads(reference), 2e-2)


def test_scaler() -> None:
    model, given = Pair(), inputs(ROWS, WIDTH)
    reference = copy.deepcopy(model)
    torch.manual_seed(4)
    truth = uncached(reference, given, LOSSES["info_nce"](reference), 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(4)
    found = cached_step(
        (model.image, model.text), given, LOSSES["info_nce"](model), chunk_size=4, scaler=scaler
    )
    assert torch.allclose(found, truth, rtol=1e-12)
    agree(grads(model), {name: 1024 * g for name, g in grads(reference).items()})
    before = model.scale.item()
    scaler.step(optimizer)
    scaler.update()
    assert model.scale.item() == pytest.approx(before - 0.1 * reference.scale.grad.item())


def test_memory() -> None:
    """Activations of 2,048 rows, 64 at a time."""
    torch.manual_seed(0)
    layers = [module for _ in range(12) for module in (nn.Linear(128, 128), nn.GELU())]
    tower = nn.Sequential(*layers)
    x, y = inputs(2048, 128, dtype=torch.float32)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = info_nce(x, y, scale=10.0, normalize=True)
        return value

    def cached() -> None:
        cached_step((tower, tower), (x, y), loss, chunk_size=64)

    def whole() -> None:
        loss(tower(x), tower(y)).backward()

    small, large = extra_memory(cached, "cpu"), extra_memory(whole, "cpu")
    if small is None or large is None:
        pytest.skip("the memory of a process is read from /proc, which this system lacks")
    assert large > 4 * small


def test_messages() -> None:
    model, (x, y) = Pair(), inputs(ROWS, WIDTH)
    loss = LOSSES["info_nce"](model)
    towers = model.image, model.text
    with pytest.raises(ValueError, match=r"inputs must be one for each of 2 encoders, got 1"):
        cached_step(towers, (x,), loss, chunk_size=4)
    with pytest.raises(TypeError, match=r"an encoder must be callable, got int"):
        cached_step((model.image, 3), (x, y), loss, chunk_size=4)
    for size in (0, 2.0, True):
        with pytest.raises(ValueError, match=r"chunk_size must be an int of at least 1, got"):
            cached_step(towers, (x, y), loss, chunk_size=size)
    with pytest.raises(ValueError, match=r"chunk_size must be one number or one for each encoder"):
        cached_step(towers, (x, y), loss, chunk_size=(1, 2, 3))
    with pytest.raises(
        ValueError, match=r"the input of encoder 1 must hold tensors of one number of rows, got \[5, 11\]"
    ):
        cached_step(towers, (x, (y, y[:5])), loss, chunk_size=4)
    with pytest.raises(
        ValueError, match=r"encoder 0 must return tensors of 4 rows for as many, got shape \[6\]"
    ):
        cached_step((lambda x: x.sum(0), model.text), (x, y), loss, chunk_size=4)
    with pytest.raises(ValueError, match=r"encoder 0 must return tensors, got none"):
        cached_step((lambda x: None, model.text), (x, y), loss, chunk_size=4)
    with pytest.raises(
        ValueError, match=r"loss must return a 0-d tensor, or a tuple that begins with one, got \[11, 6\]"
    ):
        cached_step(towers, (x, y), lambda x, y: x * y, chunk_size=4)


class Wrapper(nn.Module):
    """What cached_step looks at in a DistributedDataParallel."""

    def __init__(self, module: nn.Module, **options: bool) -> None:
        super().__init__()
        self.module, self.static_graph, self.find_unused_parameters = module, False, False
        vars(self).update(options)

    def no_sync(self) -> Any:
        return contextlib.nullcontext()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out


def test_options_of_a_wrapper_that_chunks_defeat() -> None:
    """torch would end with an internal error, or say that a variable is ready twice."""
    pair, given = Pair(), inputs(ROWS, WIDTH)

    def step(image: Any, text: Any, **options: Any) -> None:
        cached_step((image, text), given, LOSSES["info_nce"](pair), chunk_size=4, **options)

    fixed = Wrapper(pair.image, static_graph=True)
    shared, own = (Wrapper(pair.image, find_unused_parameters=True) for _ in range(2))
    for parallel in (shared, [shared]):
        with pytest.raises(ValueError, match="several encoders call looks for unused parameters"):
            step(lambda x: shared(x), lambda y: pair.text(y), parallel=parallel)
    with pytest.raises(ValueError, match="static_graph=True takes no step in chunks"):
        step(fixed, pair.text)
    step(own, pair.text)
    step(lambda x: own(x), Wrapper(pair.text), parallel=own)


def test_what_the_loss_says_besides_keeps_its_type_and_no_graph() -> None:
    class Said(NamedTuple):
        loss: Tensor
        mean: Tensor

    pair, given = Pair(), inputs(ROWS, WIDTH)
    found = cached_step(
        (pair.image, pair.text), given, lambda x, y: Said(info_nce(x, y), x.mean()), chunk_size=4
    )
    assert isinstance(found, Said) and not found.loss.requires_grad and not found.mean.requires_grad


class Both(nn.Module):
    """Both towers and the scale in the one module that data parallelism wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(dropout=0.0)
        self.pair.bias.requires_grad_(False)

    def forward(self, images: Tensor | None = None, texts: Tensor | None = None) -> Tensor:
        out: Tensor = self.pair.text(texts) if images is None else self.pair.image(images)
        return out


def _parallel(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    x, y = inputs(ROWS, WIDTH)
    truth = Both()
    info_nce(truth.pair.image(x), truth.pair.text(y), scale=truth.pair.scale.exp(), normalize=True).backward()
    here = slice(0, 8) if rank == 0 else slice(8, ROWS)  # 3 chunks, and 1

    def check(
        model: Any, encoders: Any, scale: Tensor, reduced: list[int], expected: int, parallel: Any
    ) -> None:
        for step in range(2):
            model.zero_grad()
            cached_step(
                encoders,
                (x[here], y[here]),
                lambda x, y: distributed.info_nce(x, y, scale=scale.exp(), normalize=True),
                chunk_size=3,
                parallel=parallel,
            )
            assert len(reduced) == expected * (step + 1), "gradients are averaged once a step"

    def counted(module: Any) -> tuple[Any, list[int]]:
        wrapped, calls = nn.parallel.DistributedDataParallel(module), []

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, which are strings here
            calls.append(1)
            work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        wrapped.register_comm_hook(None, hook)
        return wrapped, calls

    def same(found: Any) -> None:
        agree(grads(found), grads(truth), 1e-9)

    # one wrapper around everything, called by functions
    model = Both()
    wrapped, calls = counted(model)
    encoders = (lambda x: wrapped(images=x)), (lambda y: wrapped(texts=y))
    check(model, encoders, model.pair.scale, calls, 1, wrapped)
    same(model)
    # a wrapper around each tower; the scale is averaged by hand
    apart = Both()
    image, image_calls = counted(apart.pair.image)
    text, text_calls = counted(apart.pair.text)
    check(apart, (image, text), apart.pair.scale, image_calls, 1, ())
    assert len(text_calls) == 2
    dist.all_reduce(apart.pair.scale.grad.div_(2))
    same(apart)
    Path(out, f"{rank}.txt").write_text("done")
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_data_parallel(tmp_path: Path) -> None:
    mp.spawn(_parallel, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    assert all((tmp_path / f"{rank}.txt").read_text() == "done" for rank in range(2))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Random states of the device, float16 and its scaler; inputs stay on the CPU until their chunk's turn."""
    model, given = Pair(dtype=torch.float32).cuda(), inputs(ROWS, WIDTH, dtype=torch.float32)
    reference = copy.deepcopy(model)

    def on_gpu(tower: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: tower(x.cuda())

    for half, tolerance in ((False, 1e-5), (True, 3e-2)):
        model.zero_grad()
        reference.zero_grad()
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0) if half else None
        with torch.autocast("cuda", torch.float16, enabled=half):
            torch.manual_seed(2)
            cuda = tuple(data.cuda() for data in given)
            truth = uncached(reference, cuda, LOSSES["info_nce"](reference), 4)
            state = torch.cuda.get_rng_state()
            torch.manual_seed(2)
            found = cached_step(
                (on_gpu(model.image), on_gpu(model.text)),
                given,
                LOSSES["info_nce"](model),
                chunk_size=4,
                scaler=scaler,
            )
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert torch.allclose(found, truth, rtol=1e-5)
        agree(grads(model), {n: g * (256 if half else 1) for n, g in grads(reference).items()}, tolerance)
