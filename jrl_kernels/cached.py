"""cached_step: a contrastive step over a batch whose activations would not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

Encoder = Callable[..., Any]


def cached_step(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., Any],
    *,
    chunk_size: int | Sequence[int],
    scaler: Any = None,
    parallel: nn.Module | Sequence[nn.Module] = (),
) -> Any:
    """One forward and backward over a whole batch, with the activations of one chunk of it at a time.

    1. Every encoder runs over its input chunk by chunk without a graph.
    2. `loss` is computed once, of the embeddings of the whole batch, and differentiated with respect to them.
    3. Every chunk is encoded again, with a graph, under the random numbers and the autocast of its first pass, and takes its
       share of the gradient of the embeddings back to the parameters.

    Gao et al. 2021 (GradCache). The loss may be any of this package's, which do not make the logits either. The gradients equal
    those of the same chunks with all their graphs kept, and so those of a step over the whole batch, unless an encoder draws
    random numbers or looks at other rows (batch normalisation sees a chunk, and updates its running statistics twice).

        loss = cached_step(
            (image_encoder, text_encoder), (images, tokens),
            lambda x, y: info_nce(x, y, scale=log_scale.exp(), normalize=True), chunk_size=64,
        )
        optimizer.step()

    Args:
        encoders: one, or several; modules or functions that return a tensor, or a tuple, list or dict of tensors, of as many
            rows as they are given.
        inputs: one for each encoder (for one encoder that is not in a sequence: its input): a tensor; a tuple or list, given as
            positional arguments; or a mapping, given as keywords. Tensors with axes are cut along their first, which they must
            share; everything else is given to every chunk as it is.
        loss: called with what each encoder returned, of the whole batch; returns a 0-d tensor, or a tuple that begins with one.
            What it learns (a scale) gets its gradient too.
        chunk_size: rows at a time, or one number for each encoder.
        scaler: a torch.amp.GradScaler; then `scaler.step(optimizer)` and `scaler.update()` are left to do.
        parallel: the DistributedDataParallel modules that encoders call, where an encoder is a function; those among the encoders
            are found. Their gradients are averaged once, with the last chunk of every encoder, which are encoded together.

    Returns:
        What `loss` returned, its tensors detached. Gradients are added to `.grad`, as by `loss.backward()`.

    Raises:
        TypeError, ValueError: an argument of another type or size; an output of another number of rows; a loss that is not 0-d; a
            DistributedDataParallel with static_graph, or with find_unused_parameters where several encoders share one.
    """
    several = isinstance(encoders, Sequence)
    functions: list[Encoder] = list(encoders) if isinstance(encoders, Sequence) else [encoders]
    given = list(inputs) if several else [inputs]
    if len(given) != len(functions) or not functions:
        raise ValueError(
            f"cached_step: inputs must be one for each of {len(functions)} encoders, got {len(given)}"
        )
    for function in functions:
        if not callable(function):
            raise TypeError(f"cached_step: an encoder must be callable, got {type(function).__name__}")
    sizes = list(chunk_size) if isinstance(chunk_size, Sequence) else [chunk_size] * len(functions)
    if len(sizes) != len(functions):
        raise ValueError(
            f"cached_step: chunk_size must be one number or one for each encoder, got {chunk_size!r}"
        )
    columns = [
        _chunks(place, *pair, size)
        for place, (pair, size) in enumerate(zip(zip(functions, given, strict=True), sizes, strict=True))
    ]
    wrappers = _synchronised([*functions, *([parallel] if isinstance(parallel, nn.Module) else parallel)])
    _check_wrappers(wrappers, functions)

    with _no_sync(wrappers), torch.no_grad():
        embeddings = [_Embeddings([chunk.first() for chunk in column]) for column in columns]
    # Weights that autocast has cast without a graph would take none of the gradients of the second pass.
    torch.clear_autocast_cache()

    with torch.enable_grad():
        result = loss(*(embedding.whole for embedding in embeddings))
    value = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(value, Tensor) or value.dim() != 0:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"cached_step: loss must return a 0-d tensor, or a tuple that begins with one, got {found}"
        )
    learned = _differentiate(value if scaler is None else scaler.scale(value), embeddings)

    turns = _turns(columns, embeddings, together=bool(wrappers))
    frozen: set[int] = set()
    for turn in turns:
        last = turn is turns[-1]
        pairs: list[tuple[Tensor, Tensor]] = []
        with contextlib.nullcontext() if last else _no_sync(wrappers):
            for chunk, gradients in turn:
                if chunk.encoder_number not in frozen:
                    found_pairs = chunk.again(gradients)
                    if not found_pairs:
                        frozen.add(chunk.encoder_number)
                    pairs += found_pairs
            if last:
                # In one backward with the last chunks, in which a parallel module waits for all of its parameters.
                pairs += learned
            if pairs:
                _backward(pairs)
        del pairs
        torch.clear_autocast_cache()
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)


class _Chunk:
    """Some rows of an encoder's input, and the random states in which it first met them."""

    def __init__(self, number: int, encoder: Encoder, arguments: Any, keywords: Any, rows: int) -> None:
        self.encoder_number = number
        self.rows = rows
        self._call: Callable[[], Any] = lambda: encoder(*arguments, **keywords)
        self._devices = {
            leaf.get_device()
            for leaf in pytree.tree_leaves((arguments, keywords))
            if isinstance(leaf, Tensor) and leaf.is_cuda
        }

    def first(self) -> tuple[list[Any], Any]:
        """Its outputs without a graph, flat, and how to put them together."""
        if torch.cuda.is_initialized():
            self._devices.add(torch.cuda.current_device())
        self._cpu_state = torch.get_rng_state()
        self._cuda_states = {device: torch.cuda.get_rng_state(device) for device in self._devices}
        outputs, form = pytree.tree_flatten(self._call())
        if not any(isinstance(output, Tensor) for output in outputs):
            raise ValueError(f"cached_step: encoder {self.encoder_number} must return tensors, got none")
        for output in outputs:
            if isinstance(output, Tensor) and (output.dim() == 0 or output.shape[0] != self.rows):
                raise ValueError(
                    f"cached_step: encoder {self.encoder_number} must return tensors of {self.rows} rows for as many, "
                    f"got shape {list(output.shape)}"
                )
        return outputs, form

    def again(self, gradients: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """Its outputs with a graph, each with its gradient; none where nothing behind them is learned."""
        with torch.random.fork_rng(devices=sorted(self._devices)), torch.enable_grad():
            torch.set_rng_state(self._cpu_state)
            for device, state in self._cuda_states.items():
                torch.cuda.set_rng_state(state, device)
            outputs = pytree.tree_leaves(self._call())
        return [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]


class _Embeddings:
    """What an encoder returned for all chunks, as leaves of the loss's graph, and later their gradients."""

    def __init__(self, chunks: list[tuple[list[Any], Any]]) -> None:
        form = chunks[0][1]
        self.rows = [next(o.shape[0] for o in outputs if isinstance(o, Tensor)) for outputs, _ in chunks]
        self.leaves: list[Any] = []
        for parts in zip(*(outputs for outputs, _ in chunks), strict=True):
            leaf = torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf = leaf.detach().requires_grad_()
            self.leaves.append(leaf)
        self.whole = pytree.tree_unflatten(self.leaves, form)
        self.gradients: list[Tensor | None] = []

    def learned(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    def set_gradients(self, found: Iterator[Tensor | None]) -> None:
        for leaf in self.leaves:
            if not (isinstance(leaf, Tensor) and leaf.requires_grad):
                self.gradients.append(None)
                continue
            gradient = next(found)
            # Zeros where the loss does not look: a parallel module waits for a gradient all the same.
            self.gradients.append(torch.zeros_like(leaf) if gradient is None else gradient)

    def of_chunks(self) -> list[list[Tensor | None]]:
        cut = [[None] * len(self.rows) if g is None else g.split(self.rows) for g in self.gradients]
        return [list(parts) for parts in zip(*cut, strict=True)]


def _chunks(number: int, encoder: Encoder, given: Any, size: int) -> list[_Chunk]:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"cached_step: chunk_size must be an int of at least 1, got {size!r}")
    if isinstance(given, Mapping):
        form: Any = (), dict(given)
    elif isinstance(given, (tuple, list)):
        form = tuple(given), {}
    else:
        form = (given,), {}
    lengths = {leaf.shape[0] for leaf in pytree.tree_leaves(form) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(lengths) != 1:
        raise ValueError(
            f"cached_step: the input of encoder {number} must hold tensors of one number of rows, got {sorted(lengths)}"
        )
    rows = lengths.pop()

    def cut(start: int) -> _Chunk:
        def part(leaf: Any) -> Any:
            return leaf[start : start + size] if isinstance(leaf, Tensor) and leaf.dim() else leaf

        arguments, keywords = pytree.tree_map(part, form)
        return _Chunk(number, encoder, arguments, keywords, min(size, rows - start))

    return [cut(start) for start in range(0, max(rows, 1), size)]


def _differentiate(value: Tensor, embeddings: list[_Embeddings]) -> list[tuple[Tensor, Tensor]]:
    """Gives the embeddings their gradients; returns what else the loss learns, with its gradients."""
    leaves = [leaf for embedding in embeddings for leaf in embedding.learned()]
    known = {id(leaf) for leaf in leaves}
    others = [leaf for leaf in _parameters(value) if id(leaf) not in known]
    with _without_autocast():
        found = torch.autograd.grad(value, [*leaves, *others], allow_unused=True)
    gradients = iter(found)
    for embedding in embeddings:
        embedding.set_gradients(gradients)
    return [(leaf, g) for leaf, g in zip(others, gradients, strict=True) if g is not None]


def _parameters(value: Tensor) -> list[Tensor]:
    """The leaves that a graph accumulates gradients in, in the order in which they are found."""
    found: dict[int, Tensor] = {}
    seen: set[Node] = set()
    stack: list[Node | None] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        stack += [following for following, _ in node.next_functions]
    return list(found.values())


Turn = list[tuple[_Chunk, list[Tensor | None]]]


def _turns(columns: list[list[_Chunk]], embeddings: list[_Embeddings], together: bool) -> list[Turn]:
    """Which chunks are encoded again at a time: one, or at last the last ones of all encoders together."""
    pairs = [
        list(zip(column, embedding.of_chunks(), strict=True))
        for column, embedding in zip(columns, embeddings, strict=True)
    ]
    if not together:
        return [[pair] for column in pairs for pair in column]
    return [*([pair] for column in pairs for pair in column[:-1]), [column[-1] for column in pairs]]


def _backward(pairs: list[tuple[Tensor, Tensor]]) -> None:
    with _without_autocast():
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def _synchronised(candidates: list[Any]) -> list[Any]:
    """The modules among them, or within, that synchronise gradients unless told not to (DDP, FSDP)."""
    found: dict[int, Any] = {}
    for candidate in candidates:
        owner = getattr(candidate, "__self__", candidate)  # of a method
        if isinstance(owner, nn.Module):
            found |= {id(module): module for module in owner.modules() if hasattr(module, "no_sync")}
    return list(found.values())


def _check_wrappers(wrappers: list[Any], encoders: list[Encoder]) -> None:
    if any(getattr(wrapper, "static_graph", False) for wrapper in wrappers):
        raise ValueError(
            "cached_step: a DistributedDataParallel with static_graph=True takes no step in chunks; leave it out"
        )
    # a module without a wrapper within calls none
    callers = [e for e in encoders if not isinstance(e, nn.Module) or _synchronised([e])]
    if len(wrappers) < len(callers) and any(getattr(w, "find_unused_parameters", False) for w in wrappers):
        raise ValueError(
            "cached_step: a DistributedDataParallel that several encoders call looks for unused parameters at each call, and "
            "finds the other encoders'; wrap each encoder by itself, or leave find_unused_parameters out"
        )


@contextlib.contextmanager
def _no_sync(modules: list[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.no_sync())
        yield


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """A backward is not to be cast, whatever the caller's forward is under."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
