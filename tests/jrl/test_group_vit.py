"""GroupViT: its encoder, losses, training steps, saving and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.encoders import ImageEncoder
from jrl.encoders.group_vit import GroupViTImageEncoder
from jrl.encoders.group_vit_blocks import AssignAttention, DropPath, GroupingOptions
from jrl.objectives import ContrastiveObjective
from jrl.objectives.multi_label import MultiLabelObjective
from jrl.systems import GroupViT, load_system
from tests.jrl.group_vit_fixtures import (
    IMAGE,
    batch_of_halves,
    perturb,
    sentences,
    small_group_vit,
    two_halves,
)
from tests.ops.conformance import det

VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def assign_attention(width: int = 6, **options: Any) -> AssignAttention:
    module = AssignAttention(GroupingOptions(width, 1, 1, 1, 1, **options)).double()
    state = module.state_dict()
    for number, name in enumerate(sorted(state), start=1):
        state[name].copy_(det(*state[name].shape, a=0.11 * number))
    return module.eval()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_assign_attention_has_its_golden_values(backend: str) -> None:
    groups, tokens = det(2, 3, 6, a=0.37), det(2, 5, 6, a=0.53)
    out, map_ = assign_attention(backend=backend)(groups, tokens, soft=True)
    assert out.sum().item() == pytest.approx(32.7501292845, rel=1e-9)
    row = [0.81424944, 2.97104302, -3.78912414, 6.72161766, -4.46648064, 4.74525383]
    assert out[0, 1].tolist() == pytest.approx(row, rel=1e-8)
    # the third group is empty
    assert map_.hard[0].T.tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
    soft = [
        [0.0147923, 0.70515751, 0.01463851, 0.72070743, 0.01477428],
        [0.94379261, 0.03650537, 0.94047692, 0.03744402, 0.93593044],
        [0.04141509, 0.25833713, 0.04488457, 0.24184855, 0.04929528],
    ]
    assert map_.soft is not None
    torch.testing.assert_close(map_.soft[0].mT, torch.tensor(soft).double(), rtol=1e-6, atol=1e-8)


def test_patent_mode_has_neither_eps_nor_scale() -> None:
    module = assign_attention(assign_eps=0.0, assign_scale=1.0)
    groups, tokens = det(2, 3, 6, a=0.37), det(2, 5, 6, a=0.53)
    out, map_ = module(groups, tokens, soft=True)
    logits = module.q_proj(groups) @ module.k_proj(tokens).mT
    assert map_.soft is not None
    torch.testing.assert_close(map_.soft.mT, logits.softmax(dim=1))
    hard = F.one_hot(logits.argmax(dim=1), 3).mT.double()
    means = hard @ module.v_proj(tokens) / hard.sum(dim=2, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out, module.proj(means))


@pytest.mark.parametrize(("tau", "hard"), [(1.0, True), (0.5, False)])
def test_noise_of_a_group_shifts_all_its_logits_alike(tau: float, hard: bool) -> None:
    """The module's extra channel gives the value and the gradients of the written formula."""
    options: dict[str, Any] = {"noise": "group", "tau": tau, "hard": hard, "assign_eps": 1.0}
    module = assign_attention(**options).train()
    groups, tokens = det(2, 3, 6, a=0.37).requires_grad_(), det(2, 5, 6, a=0.53).requires_grad_()
    torch.manual_seed(5)
    out, map_ = module(groups, tokens, soft=True)
    torch.manual_seed(5)
    noise = -(-torch.rand(2, 3, 1).double().log()).log()
    clean = 6**-0.5 * (module.q_proj(groups) @ module.k_proj(tokens).mT)
    noisy = clean + noise
    soft = (noisy / tau).softmax(dim=1)
    chosen = F.one_hot(noisy.argmax(dim=1), 3).mT + (soft - soft.detach()) if hard else soft
    pooled = (chosen @ module.v_proj(tokens)) / (chosen.sum(dim=2, keepdim=True) + 1)
    wanted = module.proj(pooled)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(map_.index, noisy.argmax(dim=1))
    assert map_.soft is not None
    torch.testing.assert_close(map_.soft.mT, clean.softmax(dim=1).float(), check_dtype=False)
    upstream = det(2, 3, 6, a=0.91)
    inputs = (groups, tokens, *module.parameters())
    for found, expected in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_noise_is_drawn_in_training_only_and_follows_the_seed() -> None:
    groups, tokens = det(2, 3, 6, a=0.37), det(2, 40, 6, a=0.53)
    for kind in ("element", "group"):
        module = assign_attention(noise=kind).train()
        draws = []
        for seed in (0, 0, 1, 2, 3):
            torch.manual_seed(seed)
            draws.append(module(groups, tokens)[0])
        assert torch.equal(draws[0], draws[1])
        assert any(not torch.equal(draws[0], draw) for draw in draws[2:])
        module.eval()
        assert torch.equal(module(groups, tokens)[0], module(groups, tokens)[0])
    quiet = assign_attention(noise="none")
    assert torch.equal(quiet.train()(groups, tokens)[0], quiet.eval()(groups, tokens)[0])


def test_drop_path_leaves_out_whole_examples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(dropped.amax(dim=(1, 2)), dropped.amin(dim=(1, 2)))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(DropPath(0.9).eval()(torch.ones(5, 2)), torch.ones(5, 2))


@pytest.mark.parametrize(("std", "wanted"), [(0.02, 0.02), (None, (2 / (24 + 96)) ** 0.5)])
def test_first_weights_have_the_size_asked_for(std: float | None, wanted: float) -> None:
    weight = encoder(init_std=std).stages[0].layers[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(wanted, rel=0.1)


def test_pictures_of_any_size() -> None:
    encoder = small_group_vit().image_encoder.eval()
    perturb(encoder)
    pixels = torch.randn(2, 3, 24, 16)
    grouping = encoder.group(pixels)
    assert grouping.grid == (6, 4)
    assert [tuple(stage.soft.shape) for stage in grouping.stages] == [(2, 24, 6), (2, 6, 3)]
    assert grouping.output.tokens.shape == (2, 3, 24)
    # a side that is no multiple of the patch goes on as its border
    continued = F.pad(pixels[:, :, :22, :13], (0, 3, 0, 2), mode="replicate")
    assert torch.equal(encoder(pixels[:, :, :22, :13]).global_, encoder(continued).global_)
    # a turned picture sees turned positions
    with torch.no_grad():
        square = encoder.position_embedding.unflatten(1, (4, 4))
        encoder.position_embedding.copy_((square + square.transpose(1, 2)).flatten(1, 2))
    tall, wide = encoder._positions(6, 4), encoder._positions(4, 6)
    torch.testing.assert_close(tall.unflatten(1, (6, 4)), wide.unflatten(1, (4, 6)).transpose(1, 2))


def test_forward_and_group_agree_and_every_weight_learns() -> None:
    system = small_group_vit(image={"drop_path": 0.0}).train()
    perturb(system)
    batch = batch_of_halves(6, 0)
    losses, plots = system(batch)
    assert set(losses) == {"contrastive", "multi_label"}
    assert {"scale", "multi_label_scale", "multi_label_accuracy_x_to_y"} <= set(plots)
    sum(losses.values()).backward()
    for name, parameter in system.named_parameters():
        # the batch norm takes away what the bias before it adds; softmax over keys what the key's bias adds
        if name.endswith(("projection.0.bias", "self_attn.k_proj.bias", "attn.k_proj.bias")):
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    encoder = system.image_encoder.eval()
    output = encoder(batch["pixel_values"])
    assert torch.equal(output.tokens, encoder.group(batch["pixel_values"]).output.tokens)
    assert torch.equal(output.global_, output.tokens.mean(dim=1))


def test_losses_are_those_of_the_encodings() -> None:
    system = small_group_vit().eval()
    perturb(system)
    batch = batch_of_halves(5, 0)
    # the second prompt of the first picture is not there: the caption stands in for it
    batch["prompt_mask"][0, 1] = False
    batch["prompt_ids"][0, 1] = 7
    losses, _ = system(batch)
    image = system.encode_image(batch["pixel_values"]).global_
    caption = system.encode_text(batch["input_ids"], batch["attention_mask"]).global_
    prompts = system.encode_text(
        batch["prompt_ids"].flatten(0, 1)[torch.arange(10) != 1],
        batch["prompt_mask"].flatten(0, 1)[torch.arange(10) != 1],
    ).global_
    prompts = torch.cat([prompts[:1], caption[:1], prompts[1:]])
    logits = system.objective.scale * image @ caption.T
    wanted = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    assert losses["contrastive"].item() == pytest.approx(wanted.item(), abs=1e-5)
    owners = torch.arange(5).repeat_interleave(2)
    logits = system.multi_label.scale * image @ prompts.T
    targets = F.one_hot(owners, 5).T / 2
    wanted = (F.cross_entropy(logits, targets.float()) + F.cross_entropy(logits.T, owners)) / 2
    assert losses["multi_label"].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_switches_to_the_patent_double_the_directions_and_sum_the_prompts() -> None:
    code = small_group_vit().eval()
    patent = small_group_vit(directions="sum", multi_label=MultiLabelObjective(multi_positive="sum")).eval()
    patent.load_state_dict(code.state_dict())
    batch = batch_of_halves(6, 0)
    one, two = code(batch)[0], patent(batch)[0]
    assert two["contrastive"].item() == pytest.approx(2 * one["contrastive"].item(), rel=1e-6)
    assert two["multi_label"].item() != pytest.approx(2 * one["multi_label"].item(), rel=1e-3)
    summed = small_group_vit(multi_label=MultiLabelObjective(multi_positive="sum")).eval()
    summed.load_state_dict(code.state_dict())
    assert two["multi_label"].item() == pytest.approx(2 * summed(batch)[0]["multi_label"].item(), rel=1e-6)


@pytest.mark.parametrize("role", ["exclude", "positive"])
def test_duplicates_reach_both_objectives(role: str) -> None:
    batch = batch_of_halves(12, 0)
    # "sum": the mean over copies with the same text's vector, added up over the copies, is what it was
    plain, other = (
        small_group_vit(
            duplicate_captions=kind,
            objective=ContrastiveObjective(multi_positive="sum"),
            multi_label=MultiLabelObjective(kind, multi_positive="sum"),
        ).eval()
        for kind in ("negative", role)
    )
    for system in (plain, other):
        # weights as drawn encode all pictures and all texts almost alike, so that no role would matter
        torch.manual_seed(1)
        perturb(system)
    before, after = plain(batch)[0], other(batch)[0]
    ids = [tuple(row) for row in batch["input_ids"].tolist()]
    assert len(set(ids)) < 12
    for name in ("contrastive", "multi_label"):
        assert before[name].item() != pytest.approx(after[name].item(), rel=1e-4)


def steps(backend: str, count: int, noise: str) -> tuple[GroupViT, list[list[float]]]:
    system = small_group_vit(
        image={"backend": backend, "noise": noise},
        objective=ContrastiveObjective(backend=backend),
        multi_label=MultiLabelObjective("exclude", backend=backend),
    )
    # float64: in float32 one token in thousands is so near a tie that rounding decides its group. And not Adam,
    # which turns the rounding error of a gradient that is zero in truth into a whole step
    system = system.double().train()
    optimizer = torch.optim.SGD(system.parameters(), lr=0.05, momentum=0.9)
    return system, train(system, range(count), optimizer)


def train(
    system: GroupViT, numbers: range, optimizer: torch.optim.Optimizer | None = None, rows: int = 16
) -> list[list[float]]:
    optimizer = optimizer or torch.optim.AdamW(system.parameters(), lr=2e-3)
    losses = []
    for step in numbers:
        torch.manual_seed(step)
        batch = batch_of_halves(rows, step)
        batch["pixel_values"] = batch["pixel_values"].to(system.image_encoder.norm.weight.dtype)
        values, _ = system(batch)
        optimizer.zero_grad()
        torch.stack(list(values.values())).sum().backward()
        optimizer.step()
        losses.append([value.item() for value in values.values()])
    return losses


@pytest.mark.parametrize("noise", ["element", "group"])
def test_kernels_and_reference_take_the_same_twenty_steps(noise: str) -> None:
    fused, fused_losses = steps("auto", 20, noise)
    plain, plain_losses = steps("reference", 20, noise)
    for ours, theirs in zip(fused_losses, plain_losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)
    assert sum(fused_losses[-1]) < sum(fused_losses[0])
    for (name, ours), theirs in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8), name


def test_learns_which_colours_lie_where() -> None:
    system = small_group_vit(
        image={"drop_path": 0.0},
        duplicate_captions="exclude",
        multi_label=MultiLabelObjective("exclude"),
    ).train()
    train(system, range(150), torch.optim.AdamW(system.parameters(), lr=1e-2), rows=32)
    pixels, pairs = two_halves(64, 999)
    ids, mask = sentences(*[[10 + left, 20, 10 + right] for left in range(4) for right in range(4)])
    system.eval()
    with torch.no_grad():
        texts, images = system.encode_text(ids, mask).global_, system.encode_image(pixels).global_
    right = (images @ texts.T).argmax(dim=1) == pairs[:, 0] * 4 + pairs[:, 1]
    assert right.float().mean() > 0.6  # chance is 1/16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "image": {"noise": "group", "assign_eps": 0.0, "assign_scale": 1.0, "output_groups": (6, 4, 0)},
            "directions": "sum",
            "duplicate_captions": "exclude",
            "multi_label": MultiLabelObjective("positive", multi_positive="sum"),
        },
    ],
)
def test_saves_and_loads_the_same_system(tmp_path: Path, options: dict[str, Any]) -> None:
    system = small_group_vit(**options).eval()
    perturb(system)
    system.save_pretrained(tmp_path / "model")
    loaded = load_system(tmp_path / "model")
    assert isinstance(loaded, GroupViT)
    assert loaded.to_config() == system.to_config()
    for name, value in system.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    batch = batch_of_halves(4, 0)
    ours, theirs = system(batch)[0], loaded(batch)[0]
    assert {name: loss.item() for name, loss in ours.items()} == {
        name: loss.item() for name, loss in theirs.items()
    }


def test_resumed_training_goes_on_as_it_would_have() -> None:
    whole = small_group_vit().train()
    wanted = train(whole, range(6))
    first = small_group_vit().train()
    optimizer = torch.optim.AdamW(first.parameters(), lr=2e-3)
    losses = train(first, range(3), optimizer)
    second = small_group_vit().train()
    second.load_state_dict(first.state_dict())
    again = torch.optim.AdamW(second.parameters(), lr=2e-3)
    again.load_state_dict(optimizer.state_dict())
    assert losses + train(second, range(3, 6), again) == wanted


def test_mixed_precision_trains() -> None:
    for noise in ("element", "group"):
        system = small_group_vit(image={"noise": noise}, multi_label=MultiLabelObjective("exclude")).train()
        wanted = [loss.item() for loss in system(batch_of_halves(8, 0))[0].values()]
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = system(batch_of_halves(8, 0))
        assert [loss.item() for loss in losses.values()] == pytest.approx(wanted, rel=0.2)
        sum(losses.values()).backward()
        for name, parameter in system.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_evaluation_leaves_the_modes_as_they_were() -> None:
    system = small_group_vit().train()
    system.image_encoder.eval()
    system.group_maps(torch.randn(2, 3, 16, 16))
    assert system.training and system.text_encoder.training
    assert not system.image_encoder.training and not system.image_encoder.norm.training


def test_word_regions_are_distributions_over_patches() -> None:
    system = small_group_vit().train()
    perturb(system)
    ids, mask = sentences([10, 20, 11], [12])
    found = system.word_regions(torch.randn(2, 3, 24, 16), ids, mask)
    assert found.grid == (6, 4)
    assert found.attention.shape == (2, 5, 24)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.attention.sum(dim=2), mask.float())
    # word by word: the segments that fit it best, spread over their patches
    system.eval()
    grouping = system.image_encoder.group(torch.ones(1, 3, 16, 16))
    one = system.word_regions(torch.ones(1, 3, 16, 16), ids[:1])
    tokens = system.text_encoder(ids[:1]).tokens[0]
    words = F.normalize(system.text_projection(tokens), dim=-1)
    segments = F.normalize(system.image_projection(grouping.output.tokens[0]), dim=-1)
    product = grouping.stages[0].soft[0] @ grouping.stages[1].soft[0]
    choice = (system.objective.scale * words @ segments.T).softmax(dim=1)
    wanted = choice @ (product / product.sum(dim=0)).T
    torch.testing.assert_close(one.attention[0], wanted)
    assert one.mask.all()


def encoder(**options: Any) -> GroupViTImageEncoder:
    return GroupViTImageEncoder(**{**IMAGE, **options})


def without(batch: dict[str, Tensor], **changes: Tensor) -> dict[str, Tensor]:
    return {**batch, **changes}


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: encoder(image_size=18), ValueError, "image_size"),
        (lambda: encoder(width=25), ValueError, "width"),
        (lambda: encoder(depths=(1, 1)), ValueError, "one entry a stage"),
        (lambda: encoder(depths=(1, 0, 1)), ValueError, "depths"),
        (lambda: encoder(group_tokens=(0, 6, 3)), ValueError, "group_tokens"),
        (lambda: encoder(group_tokens=(0, 0, 0)), ValueError, "group_tokens"),
        (lambda: encoder(output_groups=(6, 0, 0)), ValueError, "output_groups"),
        (lambda: encoder(drop_path=1.0), ValueError, "drop_path"),
        (lambda: encoder(noise="some"), ValueError, "noise"),
        (lambda: encoder(activation="step"), ValueError, "activation"),
        (lambda: encoder(tau=0.0), ValueError, "tau"),
        (lambda: encoder(assign_eps=-1.0), ValueError, "assign_eps"),
        (lambda: encoder(init_std=0.0), ValueError, "init_std"),
        (lambda: encoder(mlp_width=0), ValueError, "mlp_width"),
        (lambda: encoder()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), TypeError, "pixel_values"),
        (lambda: encoder()(torch.zeros(1, 1, 16, 16)), ValueError, "pixel_values"),
        (lambda: encoder()(torch.zeros(1, 3, 0, 16)), ValueError, "pixel_values"),
        (lambda: small_group_vit(directions="both"), ValueError, "directions"),
        (lambda: small_group_vit(duplicate_captions="maybe"), ValueError, "duplicate_captions"),
        (lambda: small_group_vit(objective=ContrastiveObjective("sigmoid")), ValueError, "objective"),
        (lambda: small_group_vit(multi_label=ContrastiveObjective()), TypeError, "multi_label"),
        (
            lambda: GroupViT(ImageEncoder(VIT), small_group_vit().text_encoder),
            TypeError,
            "image_encoder",
        ),
        (
            lambda: small_group_vit()(without(batch_of_halves(3, 0), pixel_values=torch.zeros(2, 3, 16, 16))),
            ValueError,
            "input_ids",
        ),
        (
            lambda: small_group_vit()(without(batch_of_halves(3, 0), prompt_ids=torch.zeros(3, 4).long())),
            ValueError,
            "prompt_ids",
        ),
        (
            lambda: small_group_vit()(without(batch_of_halves(3, 0), prompt_mask=torch.ones(3, 2, 9))),
            ValueError,
            "prompt_mask",
        ),
        (lambda: small_group_vit()({"pixel_values": torch.zeros(1, 3, 16, 16)}), KeyError, "input_ids"),
        (lambda: GroupViT.from_config({}), ValueError, "image_encoder"),
    ],
)
def test_bad_input(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()
