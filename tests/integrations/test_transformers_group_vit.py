"""GroupViT's grouping block through `gumbel_assign`, against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GroupViTConfig,
    GroupViTModel,
    GroupViTTextModel,
    GroupViTVisionConfig,
    GroupViTVisionModel,
)
from transformers.models.groupvit import modeling_groupvit as host
from transformers.models.groupvit.modeling_groupvit import GroupViTAssignAttention, GroupViTStage

from benchmarks.measure import extra_memory
from jrl_kernels.integrations import transformers_forward
from jrl_kernels.integrations.transformers import apply_to_group_vit, undo
from jrl_kernels.ops.gumbel.reference import ASSIGN_STREAM, gumbel_noise

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "depths": [1, 1, 1],
    "num_hidden_layers": 3,
    "num_group_tokens": [4, 2, 0],
    "num_output_groups": [4, 2, 0],
}


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host draws the op's noise, under a seed taken from PyTorch's generator where the op takes its own."""

    def sample(self: Any, shape: Any) -> Tensor:
        return gumbel_noise(tuple(shape), torch.randint(2**63 - 1, ()), ASSIGN_STREAM, self.loc.dtype)

    monkeypatch.setattr(torch.distributions.gumbel.Gumbel, "sample", sample)


def block(eps: float = 1.0, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    module = GroupViTAssignAttention(GroupViTVisionConfig(**{**VISION, "assign_eps": eps, **config}))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def vision_model() -> Any:
    torch.manual_seed(0)
    model = GroupViTVisionModel(GroupViTVisionConfig(**VISION))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(images: int = 3, groups: int = 4, length: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(images, groups, 16, generator=generator).requires_grad_(),
        torch.randn(images, length, 16, generator=generator).requires_grad_(),
    )


def run(module: Any, with_soft: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both outputs, and the gradients of inputs and parameters of a weighted sum of one or both."""
    query, key = (t.detach().to(module.proj.weight.dtype).requires_grad_() for t in tokens())
    torch.manual_seed(4)
    pooled, soft = module(query, key)
    weights = torch.linspace(0.5, 1.5, pooled.numel(), dtype=query.dtype).view_as(pooled)
    total = (pooled * weights).sum()
    if with_soft:
        total = (
            total + (soft * torch.linspace(-1.0, 1.0, soft.numel(), dtype=query.dtype).view_as(soft)).sum()
        )
    return pooled, soft, list(torch.autograd.grad(total, [query, key, *module.parameters()]))


@pytest.mark.parametrize("with_soft", [False, True])
@pytest.mark.parametrize("eps", [1.0, 1e-3])
@pytest.mark.parametrize("training", [True, False])
def test_the_block_is_the_hosts(same_noise: None, training: bool, eps: float, with_soft: bool) -> None:
    for seed in range(5):
        theirs = block(eps, seed).train(training)
        ours = apply_to_group_vit(copy.deepcopy(theirs))
        assert type(ours) is not type(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            *expected, wanted = run(theirs.to(dtype), with_soft)
            *found, given = run(ours.to(dtype), with_soft)
            for mine, its in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance / 10)
            largest = max(float(its.norm()) for its in wanted)
            for mine, its in zip(given, wanted, strict=True):
                # A softmax over the groups takes out the bias of the queries: its gradient is rounding alone.
                assert float((mine - its).norm()) <= tolerance * max(float(its.norm()), largest / 10)


def test_noise_is_drawn_in_training_alone() -> None:
    module = apply_to_group_vit(block())
    query, key = tokens()
    first, second = module.train()(query, key)[0], module(query, key)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    first = module(query, key)[0]
    torch.manual_seed(1)
    assert torch.equal(module(query, key)[0], first)
    assert torch.equal(module.eval()(query, key)[0], module(query, key)[0])


def test_the_noise_has_the_hosts_distribution() -> None:
    """How often each group wins a token, over many draws of both."""
    theirs = block().train()
    ours = apply_to_group_vit(copy.deepcopy(theirs))
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 16, generator=generator).expand(4096, -1, -1)
    key = torch.randn(1, 1, 16, generator=generator).expand(4096, -1, -1)
    torch.manual_seed(0)
    shares = []
    for module in (theirs, ours):
        with torch.no_grad():
            # One token: the output of a group that won is apart from that of one that did not.
            won = (module(query, key)[0] - module.proj.bias).norm(dim=-1) > 1e-4
        assert (won.sum(dim=1) == 1).all()
        shares.append(won.float().mean(dim=0))
    torch.testing.assert_close(shares[1], shares[0], rtol=0, atol=0.05)
    assert shares[0].min() > 0


def test_soft_attention_is_made_where_it_is_asked_for(
    same_noise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = vision_model().train()
    ours = apply_to_group_vit(copy.deepcopy(theirs))
    made: list[tuple[int, ...]] = []
    softmax = torch.softmax

    def counted(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(tuple(scores.shape))
        return softmax(scores, *args, **kwargs)

    monkeypatch.setattr(transformers_forward.torch, "softmax", counted)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    before = [set(vars(m)) for m in ours.modules()]
    output = ours(pixels)
    assert output.attentions is None and (2, 4, 16) not in made
    torch.manual_seed(6)
    found = ours(pixels, output_attentions=True)
    assert (2, 4, 16) in made and (2, 2, 4) in made
    assert [set(vars(m)) for m in ours.modules()] == before
    torch.manual_seed(6)
    expected = theirs(pixels, output_attentions=True)
    assert len(found.attentions) == len(expected.attentions)
    for mine, its in zip(found.attentions, expected.attentions, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_segmentation_is_the_hosts() -> None:
    config = GroupViTConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 20,
            "max_position_embeddings": 6,
            "eos_token_id": 19,
        },
        vision_config=VISION,
        projection_dim=8,
        projection_intermediate_dim=12,
    )
    torch.manual_seed(0)
    theirs = GroupViTModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = apply_to_group_vit(copy.deepcopy(theirs))
    inputs = {
        "input_ids": torch.tensor([[3, 4, 19, 19, 19, 19], [5, 6, 7, 19, 19, 19]]),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "output_segmentation": True,
    }
    expected = theirs(**inputs)
    found = ours(**inputs)
    torch.testing.assert_close(found.segmentation_logits, expected.segmentation_logits, rtol=1e-4, atol=1e-3)
    # Segmentation holds a map for every text over every image: the logits beside it are the host's business.
    training = ours.train()(**inputs, return_loss=True)
    assert training.segmentation_logits is not None and training.logits_per_image is not None


def test_a_class_changes_every_block_and_undo_gives_them_back() -> None:
    forwards = (GroupViTModel.forward, GroupViTAssignAttention.forward, GroupViTStage.forward)
    model = vision_model()
    apply_to_group_vit(GroupViTVisionModel)
    try:
        assert GroupViTModel.forward is forwards[0]  # it has a loss; the class given has none
        assert GroupViTAssignAttention.forward is not forwards[1] and GroupViTStage.forward is not forwards[2]
        pixels = torch.randn(2, 3, 32, 32)
        torch.manual_seed(6)
        found = model.train()(pixels).pooler_output
    finally:
        undo(GroupViTVisionModel)
    assert (GroupViTModel.forward, GroupViTAssignAttention.forward, GroupViTStage.forward) == forwards
    with pytest.raises(
        TypeError, match="expected GroupViTModel or GroupViTVisionModel, got GroupViTTextModel"
    ):
        apply_to_group_vit(GroupViTTextModel)
    assert (GroupViTModel.forward, GroupViTAssignAttention.forward, GroupViTStage.forward) == forwards
    patched = apply_to_group_vit(copy.deepcopy(model))
    torch.manual_seed(6)
    assert torch.equal(patched(pixels).pooler_output, found)
    assert {type(m).__name__ for m in patched.modules() if hasattr(type(m), "_jrl_host")} == {
        "GroupViTAssignAttention",
        "GroupViTStage",
    }
    undo(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in model.modules()]


def test_half_precision_and_autocast() -> None:
    module = apply_to_group_vit(block()).eval()
    query, key = tokens()
    exact = module(query, key)[0]
    with torch.autocast("cpu", torch.bfloat16):
        pooled, soft = module(query, key)
    assert pooled.dtype == torch.bfloat16 and soft.shape == (3, 4, 11)
    half, _ = copy.deepcopy(module).bfloat16()(query.bfloat16(), key.bfloat16())
    assert half.dtype == torch.bfloat16
    for output in (pooled, half):
        # A token whose two best groups tie to bfloat16's rounding may change its group.
        near = (output.float() - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1)
        assert near.float().mean() > 0.6


def test_the_assignment_matrix_is_not_kept() -> None:
    theirs = block(num_attention_heads=2).train()
    query = torch.randn(32, 64, 16)
    key = torch.randn(32, 512, 16)
    held = {}
    for name, module in (("host", theirs), ("fused", apply_to_group_vit(copy.deepcopy(theirs)))):
        if name == "fused":
            module.soft_attention_asked = False
        saved: list[int] = []

        def note(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            module(query, key)

        def step(module: Any = module) -> None:
            module(query, key)[0].sum().backward()

        held[name] = max(saved), extra_memory(step, "cpu")
    matrix = 32 * 64 * 512
    assert held["host"][0] == matrix and held["fused"][0] < matrix / 2
    host_peak, fused_peak = held["host"][1], held["fused"][1]
    if host_peak is None or fused_peak is None:
        pytest.skip("the memory of a process is read from /proc, which this system lacks")
    assert host_peak - fused_peak > 2 * 4 * matrix


def test_the_host_still_draws_as_the_fixture_replaces() -> None:
    """The comparison above would be empty if the host drew elsewhere."""
    logits = torch.zeros(2, 3, 4)
    torch.manual_seed(0)
    first = host.gumbel_softmax(logits, hard=True, dim=-2)
    assert not torch.equal(first, host.gumbel_softmax(logits, hard=True, dim=-2))
