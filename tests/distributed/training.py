"""What each of two ranks does in test_training.py: whole systems take steps with averaged gradients, beside one process.

Everything is in float64, so that a wrong share of a gradient cannot hide in rounding. Batch norms rest or are left out, since
theirs are statistics of one rank's rows.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from jrl.encoders import ImageEncoder, TextEncoder
from jrl.encoders.group_vit import GroupViTImageEncoder
from jrl.objectives import (
    AttentionCritic,
    ContrastiveObjective,
    DeepInfoMax,
    MaskedWords,
    MutualInformationEstimator,
)
from jrl.objectives.multi_label import MultiLabelObjective
from jrl.objectives.segment_text import SegmentTextObjective
from jrl.systems import CLIP, CriticOptions, GroupViT, LayerPair, MutualInformation, System

PAIRS = 7
SHARES = (slice(0, 4), slice(4, 7))
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VIT = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.0, **SMALL}
BERT = {
    "model_type": "bert",
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **SMALL,
}
CLIP_TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **SMALL,
}


def alone(function: Callable[[], Any]) -> Any:
    """What `function` returns where this process knows of no others."""
    known, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        return function()
    finally:
        dist.is_initialized = known


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 30, (PAIRS, 6), generator=generator)
    lengths = torch.randint(2, 5, (PAIRS,), generator=generator)
    prompts = torch.randint(3, 5, (PAIRS, 2, 4), generator=generator)  # few words, so that texts come twice
    ids[:, 0], prompts[..., 0], prompts[..., 3] = 1, 1, 2
    ids[torch.arange(PAIRS), lengths] = 2
    ids[5] = ids[1]  # the same caption on both ranks
    lengths[5] = lengths[1]
    mask = torch.arange(6) <= lengths[:, None]
    return {
        "pixel_values": torch.randn(PAIRS, 3, 16, 16, generator=generator, dtype=torch.float64),
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
    }


def steps(system: System, place: slice, average: bool) -> list[float]:
    """Two steps of plain gradient descent; the losses before each."""
    losses = []
    for step in range(2):
        # before the forward: after it a sharded module holds its gathered parameters, whose gradients are others
        system.zero_grad()
        values, _ = system({name: value[place] for name, value in batch(step).items()})
        loss = torch.stack(list(values.values())).sum()
        loss.backward()
        for parameter in system.parameters():
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            if average:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            with torch.no_grad():
                parameter.sub_(gradient, alpha=0.3)
        losses.append(loss.item())
    return losses


def same_weights(system: System, rank: int, shard: Callable[[System], None] | None = None) -> None:
    """`shard` makes the gradients of every parameter averages; without it they are averaged here."""
    system = system.double()
    single, start = copy.deepcopy(system), copy.deepcopy(system.state_dict())
    if shard is not None:
        shard(system)
    truth = alone(lambda: steps(single, slice(0, PAIRS), False))
    found = steps(system, SHARES[rank], shard is None)
    # nothing that has a part per rank would agree so well, nor would a share of a gradient that is forgotten
    assert max(abs(a - b) for a, b in zip(found, truth, strict=True)) < 1e-9, (found, truth)
    moved = 0
    for name, parameter in system.named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        other = single.get_parameter(name)
        error = float((value - other).abs().max().detach())
        assert error < 1e-9, f"{name}: {error:.2g}"
        moved += int(not torch.equal(other, start[name]))
    assert moved > 20


def clip(**options: Any) -> CLIP:
    torch.manual_seed(0)
    return CLIP(ImageEncoder(VIT), TextEncoder(BERT), projection_dim=12, **options)


def fully_sharded(rank: int) -> None:
    """FSDP2 averages as data parallelism does. It shards no scalar: a hook averages the temperature (docs/distributed.md)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def average(scalar: Tensor) -> None:
        assert scalar.grad is not None
        dist.all_reduce(scalar.grad)
        scalar.grad /= dist.get_world_size()

    def shard(system: System) -> None:
        scalars = {parameter for parameter in system.parameters() if parameter.ndim == 0}
        assert scalars
        for part in (system.image_encoder, system.text_encoder, system):
            fully_shard(part, mesh=mesh, ignored_params=scalars)
        for scalar in scalars:
            scalar.register_post_accumulate_grad_hook(average)
        sharded = [parameter for parameter in system.parameters() if isinstance(parameter, DTensor)]
        assert len(sharded) == len(list(system.parameters())) - len(scalars)

    for form in ("gather", "ring"):
        same_weights(clip(objective=ContrastiveObjective(form=form)), rank, shard)


def clips(rank: int) -> None:
    same_weights(clip(), rank)
    same_weights(clip(objective=ContrastiveObjective("sigmoid")), rank)
    same_weights(clip(objective=ContrastiveObjective(form="ring")), rank)
    same_weights(clip(objective=ContrastiveObjective("sigmoid", form="ring")), rank)


def mutual_information(rank: int) -> None:
    def system(critic: dict[str, Any], **options: Any) -> MutualInformation:
        torch.manual_seed(0)
        critics = CriticOptions(dim=8, projection="mlp", scale=None, **critic)
        layers = [LayerPair(), LayerPair(image=0, text=0, weight=0.5)]
        return MutualInformation(ImageEncoder(VIT), TextEncoder(BERT), critics, layers=layers, **options)

    # one caption of each step has no word
    silent = [
        1,
        2,
        *(token for step in range(2) for token in batch(step)["input_ids"][3].tolist() if token > 2),
    ]
    for critic, options in (
        ({}, {"special_token_ids": silent, "duplicate_captions": "exclude"}),
        ({}, {"special_token_ids": silent, "estimator": MutualInformationEstimator("dv")}),
        ({"per_word": True}, {"special_token_ids": silent}),
        ({"length_norm": "mean"}, {"duplicate_captions": "exclude"}),
        ({}, {"estimator": MutualInformationEstimator(direction="image_to_text")}),
        ({"per_word": True}, {"duplicate_captions": "exclude"}),
        ({}, {"estimator": MutualInformationEstimator("jsd")}),
        ({"length_norm": "mean"}, {"estimator": MutualInformationEstimator("dv")}),
    ):
        same_weights(system(critic, **options), rank)


def unread_layers(rank: int) -> None:
    """DDP waits for every weight that is trained: one without a gradient would end the second step."""
    for options in (
        {"joint_weight": 0.0, "image_objective": DeepInfoMax(16, 16, units=8)},
        {"joint_weight": 0.0, "text_objective": MaskedWords(16, 30, 4, [0, 1, 2])},
        {"freeze": ["image"], "layers": [LayerPair(image=0)]},
        {"layers": [LayerPair(image=0, text=0)]},
    ):
        torch.manual_seed(0)
        critics = CriticOptions(dim=8, projection="mlp", scale=None)
        system = MutualInformation(ImageEncoder(VIT), TextEncoder(BERT), critics, **options).double().train()
        assert (system.idle is not None) == (options == {"layers": [LayerPair(image=0, text=0)]})
        wrapped = DistributedDataParallel(system, find_unused_parameters=system.idle is not None)
        for step in range(3):
            system.zero_grad()
            losses, _ = wrapped({name: value[SHARES[rank]] for name, value in batch(step).items()})
            torch.stack(list(losses.values())).sum().backward()
        trained = [parameter for parameter in system.parameters() if parameter.requires_grad]
        everywhere = system.idle is None
        assert trained and (not everywhere or all(parameter.grad is not None for parameter in trained))


def masked_locations(rank: int) -> None:
    """The critic per word takes the locations of all ranks with their masks."""
    generator = torch.Generator().manual_seed(3)
    locations, words = (torch.randn(PAIRS, n, 5, generator=generator, dtype=torch.float64) for n in (4, 3))
    real = torch.rand(PAIRS, 4, generator=generator) < 0.7
    real[:, 0] = True
    for per_word in (False, True):
        critic = AttentionCritic(*(nn.Identity() for _ in range(4)), per_word=per_word)
        truth = critic(locations, words, location_mask=real)
        here = SHARES[rank]
        found = critic(locations[here], words[here], location_mask=real[here], across_ranks=True)
        torch.testing.assert_close(found, truth[:, here] if per_word else truth[here], rtol=1e-12, atol=1e-12)


def group_vit(rank: int) -> None:
    for duplicates in ("negative", "exclude", "positive"):
        torch.manual_seed(0)
        encoder = GroupViTImageEncoder(
            image_size=16, patch_size=4, width=16, heads=2, depths=(1, 1, 1), group_tokens=(4, 2, 0)
        )
        system = GroupViT(
            encoder,
            TextEncoder(CLIP_TEXT, "eos"),
            projection_dim=8,
            projection_hidden=12,
            multi_label=MultiLabelObjective(duplicates),
            segment_text=SegmentTextObjective(duplicate_texts=duplicates),
            duplicate_captions=duplicates,
        )
        # at rest: batch norms, and the noise of the assignment, which ranks draw for themselves
        same_weights(system.eval(), rank)


CHECKS = (clips, fully_sharded, mutual_information, unread_layers, masked_locations, group_vit)


def main(rank: int, size: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    problems = []
    for function in CHECKS:
        try:
            function(rank)
        except Exception:
            problems.append(f"{function.__name__}: {traceback.format_exc(limit=-3)}")
        dist.barrier()
    Path(out, f"{rank}.txt").write_text("\n".join(problems))
    dist.destroy_process_group()
