"""The calls of every op on which test_contract.py tries what all ops owe: one line a way to call an op."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from jrl_kernels import (
    gumbel_assign,
    info_nce,
    info_nce_from_scores,
    max_sim,
    max_sim_varlen,
    mutual_information,
    partition_nce,
    ranking_loss,
    ranking_loss_from_scores,
    sigmoid_contrastive,
    word_region_scores,
)
from jrl_kernels.ops.gumbel import cases as gumbel
from jrl_kernels.ops.info_nce import cases as contrastive
from jrl_kernels.ops.max_sim import cases as late
from jrl_kernels.ops.mutual_information import cases as bounds
from jrl_kernels.ops.partition_nce import cases as partition
from jrl_kernels.ops.ranking_loss import cases as ranking
from jrl_kernels.ops.word_region import cases as attention
from tests.ops.test_gumbel import embedding, pooled


@dataclasses.dataclass(frozen=True)
class Call:
    """One way to call a public function: arguments from the op's cases on some device, and options."""

    name: str
    function: Callable[..., Any]
    make: Callable[..., dict[str, Any]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def on(self, backend: str) -> Callable[..., Any]:
        return partial(self.function, **self.options, backend=backend)


@dataclasses.dataclass(frozen=True)
class Contract:
    """The calls on which one op is tried, duty by duty."""

    operators: tuple[str, ...]
    """Registered operators whose calls opcheck repeats."""
    small: tuple[Call, ...]
    """For opcheck: every path through the schema."""
    compiled: tuple[Call, ...]
    repeated: tuple[Call, ...]
    """Several tiles and threads: sums that another order would change."""
    refused: tuple[tuple[Call, str], ...]
    """With the argument whose gradient is differentiated, on which it depends."""
    twice: tuple[tuple[Call, tuple[str, ...]], ...]
    """With the arguments by which the reference is differentiated twice; tiny, in float64."""
    captured: tuple[Call, ...]
    """For CUDA graphs; the leaf that comes first changes between capture and replay."""
    autocast: tuple[tuple[Call, tuple[str, ...]], ...] = ()
    """With the arguments that autocast casts."""
    autocast_result: torch.dtype = torch.float32


def of_kind(cases: Any, shape: Any, **options: Any) -> Callable[..., dict[str, Any]]:
    return partial(cases.make_inputs, cases.SHAPES[shape] if isinstance(shape, str) else shape, **options)


def sigmoid(shape: contrastive.Shape, **options: Any) -> Callable[..., dict[str, Any]]:
    """Inputs of `sigmoid_contrastive`: those of `info_nce` and a bias."""

    def make(**where: Any) -> dict[str, Any]:
        arguments = contrastive.make_inputs(shape, **options, **where)
        return {**arguments, "bias": torch.full_like(arguments["scale"], -3.0).requires_grad_()}

    return make


def scores(rows: int, columns: int) -> Callable[..., dict[str, Any]]:
    """Inputs of the losses over given scores."""

    def make(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return {"scores": drawn.to(device=device, dtype=dtype).requires_grad_()}

    return make


def packed(*arguments: Any, **options: Any) -> Callable[..., dict[str, Any]]:
    padded = of_kind(late, *arguments, **options)
    return lambda **where: late.pack(padded(**where))


def embed(shape: str | gumbel.EmbedShape, **options: Any) -> Callable[..., dict[str, Any]]:
    return partial(
        gumbel.make_embed_inputs, gumbel.EMBED_SHAPES[shape] if isinstance(shape, str) else shape, **options
    )


def info_nce_contract() -> Contract:
    kinds = ("diagonal", "index", "ids")
    few = contrastive.SHAPES["ragged"]
    tiny = {kind: of_kind(contrastive, "tiny", positives=kind, negatives=4, exclude=True) for kind in kinds}
    sigmoids = {kind: sigmoid(few, positives=kind) for kind in kinds}
    full = of_kind(contrastive, "ragged")
    square = contrastive.Shape(4, 4, 3)
    many = contrastive.Shape(1100, 1030, 33)
    turned = {"direction": "y_to_x", "multi_positive": "sum"}
    normalized = {"normalize": True}
    queue = {kind: of_kind(contrastive, "ragged", positives=kind, negatives=5) for kind in kinds}
    cast = of_kind(contrastive, "ragged", negatives=5, positives="index", scale=100.0)
    return Contract(
        operators=("info_nce_forward", "sigmoid_contrastive_forward"),
        small=(
            *(Call(f"statistics {k}", info_nce, tiny[k], {"return_stats": True}) for k in kinds),
            *(Call(f"y_to_x {k}", info_nce, tiny[k], turned) for k in kinds),
            Call("scores", info_nce_from_scores, scores(5, 6), {"direction": "x_to_y"}),
            *(Call(f"sigmoid {k}", sigmoid_contrastive, sigmoids[k]) for k in kinds),
        ),
        compiled=(
            *(Call(k, info_nce, queue[k], normalized) for k in kinds),
            *(Call(f"sigmoid {k}", sigmoid_contrastive, sigmoids[k], normalized) for k in kinds),
        ),
        repeated=(
            *(
                Call(k, info_nce, of_kind(contrastive, many, positives=k, exclude=True))
                for k in contrastive.POSITIVES
            ),
            *(
                Call(f"sigmoid {k}", sigmoid_contrastive, sigmoid(many, positives=k))
                for k in ("diagonal", "ids")
            ),
        ),
        refused=(
            (Call("both", info_nce, full), "x"),
            (Call("sigmoid", sigmoid_contrastive, sigmoid(few)), "x"),
        ),
        twice=(
            (Call("both", info_nce, of_kind(contrastive, square, scale=2.0)), ("x", "y", "scale")),
            (Call("sigmoid", sigmoid_contrastive, sigmoid(square, scale=2.0)), ("x", "y", "scale", "bias")),
        ),
        captured=(
            Call("queue", info_nce, of_kind(contrastive, contrastive.Shape(512, 512, 64), negatives=64)),
            Call("sigmoid", sigmoid_contrastive, sigmoid(contrastive.Shape(512, 512, 64))),
        ),
        autocast=(
            (Call("queue", info_nce, cast), ("x", "y", "negatives")),
            (Call("sigmoid", sigmoid_contrastive, sigmoids["index"]), ("x", "y")),
        ),
    )


def gumbel_contract() -> Contract:
    soft = {"hard": False}
    many, codes = gumbel.Shape(4, 40, 131, 33, 17), gumbel.EmbedShape(300, 70, 33, 3)
    cast = of_kind(gumbel, "ragged")
    operands = ("queries", "keys", "values")
    return Contract(
        operators=("gumbel_assign_forward", "gumbel_embed_forward"),
        small=(
            Call("assign masked", gumbel_assign, of_kind(gumbel, "tiny", mask=True)),
            Call("assign soft, no noise", gumbel_assign, of_kind(gumbel, "tiny", noise=False), soft),
            Call("embed", embedding, embed("tiny")),
            Call("embed soft", embedding, embed("tiny", hard=False)),
        ),
        compiled=(
            Call("assign", pooled, of_kind(gumbel, "tiny", mask=True)),
            Call("embed", embedding, embed("tiny")),
        ),
        repeated=(
            Call("assign", pooled, of_kind(gumbel, many)),
            Call("assign soft", pooled, of_kind(gumbel, many), soft),
            Call("embed", embedding, embed(codes)),
            Call("embed soft", embedding, embed(codes, hard=False)),
        ),
        refused=(
            (Call("assign", pooled, of_kind(gumbel, "tiny")), "values"),
            (Call("embed", embedding, embed("tiny")), "logits"),
        ),
        twice=(
            (Call("assign", pooled, of_kind(gumbel, gumbel.Shape(1, 2, 3, 2, 2)), soft), operands),
            (
                Call("embed", embedding, embed(gumbel.EmbedShape(2, 3, 2, 1), hard=False)),
                ("logits", "codebook"),
            ),
        ),
        captured=(),  # in test_gumbel_edges.py, with the noise
        autocast=(
            (Call("assign", pooled, cast), operands),
            (Call("embed", embedding, embed("ragged")), ("codebook",)),
        ),
        autocast_result=torch.bfloat16,
    )


def max_sim_contract() -> Contract:
    tiny, both = of_kind(late, "tiny", mask=True), {"direction": "both"}
    directions = ("words", "regions", "both")
    many = late.Shape(9, 11, 70, 33, 24)
    return Contract(
        operators=("max_sim_forward",),
        small=(
            *(Call(d, max_sim, tiny, {"direction": d, "mask_mode": "zero"}) for d in directions),
            *(
                Call(
                    f"packed {d}",
                    max_sim_varlen,
                    packed("tiny", mask=True),
                    {"direction": d, "reduce": "mean"},
                )
                for d in directions
            ),
        ),
        compiled=(
            Call("padded", max_sim, tiny, {**both, "mask_mode": "zero"}),
            Call("packed", max_sim_varlen, packed("tiny", mask=True), {**both, "max_seqlen_words": 6}),
        ),
        repeated=(
            Call("full", max_sim, of_kind(late, many), both),
            Call("masked", max_sim, of_kind(late, many, mask=True), both),
        ),
        refused=((Call("words", max_sim, of_kind(late, "tiny")), "words"),),
        twice=(
            (
                Call("both", max_sim, of_kind(late, late.Shape(2, 3, 3, 4, 2), mask=True), both),
                ("regions", "words"),
            ),
        ),
        captured=(
            Call(
                "both",
                max_sim,
                of_kind(late, late.Shape(8, 9, 65, 40, 64), mask=True),
                {**both, "reduce": "mean"},
            ),
        ),
        autocast=((Call("words", max_sim, of_kind(late, "ragged")), ("regions", "words")),),
    )


def word_region_contract() -> Contract:
    def setting(name: str, shape: Any, **options: Any) -> Call:
        given = of_kind(attention, shape, **options)
        settings = {k: v for k, v in attention.SETTINGS[name].items() if k not in given()}
        masked = " masked" if options.get("masks") else ""
        return Call(
            f"{name}, {shape if isinstance(shape, str) else 'many'}{masked}",
            word_region_scores,
            given,
            settings,
        )

    many, few = attention.Shape(21, 19, 9, 33, 24), attention.Shape(2, 2, 3, 3, 3)
    schema = (
        ("xmc_gan", "tiny", True),
        ("damsm", "values", True),
        ("info_ground", "values", False),
        ("dvsa", "tiny", True),
    )
    operands = ("regions", "words", "region_values", "word_values")
    cast = of_kind(attention, "values", masks=True, factors=True)
    return Contract(
        operators=("word_region_forward",),
        small=tuple(
            Call(
                name,
                word_region_scores,
                of_kind(attention, shape, masks=masks, factors=True),
                {"preset": name, "pool": "max"},
            )
            for name, shape, masks in schema
        ),
        compiled=tuple(
            setting(name, shape, masks=True)
            for name in ("damsm", "scan_i2t", "info_ground")
            for shape in ("tiny", "values")
        ),
        repeated=tuple(
            setting(name, many, masks=masks, factors=True)
            for name in ("xmc_gan", "damsm", "dvsa")
            for masks in (False, True)
        ),
        refused=((Call("default", word_region_scores, of_kind(attention, "tiny")), "words"),),
        twice=tuple(
            (
                Call(name, word_region_scores, of_kind(attention, few, seed=2), attention.SETTINGS[name]),
                operands[:2],
            )
            for name in ("xmc_gan", "damsm")
        ),
        captured=(setting("damsm", attention.Shape(24, 20, 17, 36, 128), masks=True),),
        autocast=((Call("values", word_region_scores, cast, {"normalize": False}), operands),),
    )


def ranking_loss_contract() -> Contract:
    kinds = {"sum": {"hardest": False}, "hardest": {"hardest": True}}
    wide = {m: of_kind(ranking, "wide", metric=m, exclude=True) for m in ("cosine", "order")}
    large = {
        m: of_kind(ranking, shape, metric=m, exclude=True)
        for m, shape in (
            ("dot", ranking.Shape(1100, 1030, 33, 50)),
            ("order", ranking.Shape(130, 70, 33, 50)),
        )
    }
    queue, square = ranking.Shape(512, 512, 64, 100), ranking.Shape(4, 5, 3, 2)
    turned, given = {"direction": "y_to_x"}, {"direction": "x_to_y"}
    return Contract(
        operators=("ranking_loss_forward",),
        small=tuple(
            call
            for kind, options in kinds.items()
            for call in (
                *(Call(f"{kind}, {m}", ranking_loss, wide[m], options) for m in wide),
                *(Call(f"{kind}, {m}, y_to_x", ranking_loss, wide[m], options | turned) for m in wide),
                Call(f"{kind}, scores", ranking_loss_from_scores, scores(5, 6), options | given),
            )
        ),
        compiled=tuple(
            call
            for kind, options in kinds.items()
            for call in (
                *(Call(f"{kind}, {m}", ranking_loss, wide[m], options) for m in wide),
                Call(f"{kind}, scores", ranking_loss_from_scores, scores(5, 6), options | {"reduction": "mean"}),
            )
        ),
        repeated=tuple(
            Call(f"{kind}, {m}", ranking_loss, large[m], options) for kind, options in kinds.items() for m in large
        ),
        refused=tuple(
            (Call(kind, ranking_loss, of_kind(ranking, "tiny"), options), "x") for kind, options in kinds.items()
        ),
        # The loss of dot products is piecewise bilinear: x alone would have no second derivative.
        twice=tuple(
            (
                Call(f"{kind}, {m}", ranking_loss, of_kind(ranking, square, metric=m), options | {"margin": 0.3}),
                ("x", "y"),
            )
            for kind, options in kinds.items()
            for m in ("cosine", "dot", "order")
        ),
        captured=tuple(Call(kind, ranking_loss, of_kind(ranking, queue), options) for kind, options in kinds.items()),
        autocast=tuple(
            (Call(f"{kind}, {m}", ranking_loss, of_kind(ranking, "ragged", metric=m), options), ("x", "y", "negatives"))
            for kind, options in kinds.items()
            for m in ("dot", "order")
        ),
    )  # fmt: skip


def mutual_information_contract() -> Contract:
    variants: dict[str, dict[str, Any]] = {
        "nce": {"bound": "nce"},
        "nce, y_to_x": {"bound": "nce", "direction": "y_to_x", "own_logit": -10.0},
        "nce, both": {"bound": "nce", "direction": "both"},
        "jsd": {"bound": "jsd"},
        "dv": {"bound": "dv"},
    }

    def every(shape: Any, masks: Callable[[int], bool]) -> tuple[Call, ...]:
        return tuple(
            Call(name, mutual_information, of_kind(bounds, shape, masks=masks(i)), options)
            for i, (name, options) in enumerate(variants.items())
        )

    return Contract(
        operators=("mutual_information_forward",),
        small=every("local", lambda i: i % 2 == 0),
        compiled=every("local", lambda i: i % 2 == 1),
        repeated=every(bounds.Shape(40, 31, 29, 9), lambda i: True),
        refused=tuple((call, "x") for call in every("local", lambda i: False)),
        twice=tuple((call, ("x", "y")) for call in every(bounds.Shape(2, 2, 2, 2), lambda i: i % 2 == 1)),
        captured=every(bounds.Shape(32, 16, 9, 64), lambda i: True),
        autocast=((Call("nce", mutual_information, of_kind(bounds, "local")), ("x", "y")),),
    )


def partition_nce_contract() -> Contract:
    def each(shape: Any) -> tuple[Call, ...]:
        return tuple(
            Call(name, partition_nce, of_kind(partition, shape, masked=masked))
            for name, masked in (("all", False), ("masked", True))
        )

    def alone(**where: Any) -> dict[str, Any]:
        """Nothing requires a gradient."""
        arguments = partition.make_inputs(partition.SHAPES["tiny"], **where)
        return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

    return Contract(
        operators=("partition_nce_forward",),
        small=(*each("ragged"), Call("no gradient", partition_nce, alone)),
        compiled=(*each("ragged"), Call("no gradient", partition_nce, alone)),
        repeated=each(partition.Shape(33, 500, 40, 7, 300))[1:],
        refused=((each("ragged")[0], "query"),),
        twice=tuple((call, ("query", "scale")) for call in each(partition.Shape(2, 5, 2, 2, 3))),
        captured=each(partition.Shape(64, 1000, 128, 3, 200))[1:],
    )  # fmt: skip


CONTRACTS: dict[str, Contract] = {
    "info_nce": info_nce_contract(),
    "gumbel": gumbel_contract(),
    "max_sim": max_sim_contract(),
    "word_region": word_region_contract(),
    "ranking_loss": ranking_loss_contract(),
    "mutual_information": mutual_information_contract(),
    "partition_nce": partition_nce_contract(),
}
