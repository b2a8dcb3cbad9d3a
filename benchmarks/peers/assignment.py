"""Peers of hard assignment."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..workloads.workload import Function
from .peer import Peer


class _Given(nn.Module):
    """In place of a projection: what was set, whatever comes in."""

    output: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.output


def _transformers() -> Function:
    from transformers import GroupViTVisionConfig
    from transformers.models.groupvit.modeling_groupvit import GroupViTAssignAttention

    # The size is that of the four projections alone, which are taken out; in evaluation mode it draws no noise.
    block: Any = GroupViTAssignAttention(GroupViTVisionConfig(hidden_size=8)).eval()
    block.q_proj = block.k_proj = block.proj = nn.Identity()
    block.v_proj = given = _Given()

    def pooled(
        queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor, noise: bool, eps: float
    ) -> Tensor:
        if noise:
            raise NotImplementedError("its noise is not ours, so nothing would agree")
        block.scale, block.assign_eps, given.output = scale, eps, values
        return block(queries, keys)[0]

    return pooled


PEERS = {
    "gumbel_assign": {
        "transformers": Peer(
            "transformers",
            _transformers,
            why="GroupViTAssignAttention without its projections; a second, soft map comes with it",
        ),
    },
}
