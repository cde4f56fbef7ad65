"""Gates of an expert's single ranks, beside its own gate: y = W x + gate scaling B (lambda * A x), lambda [.., rank].

task      a learned lambda per task and layer, 1 at first; the tasks' mean where a sample's is unknown. The diagonal of
          MTL-LoRA's Lambda_t (arXiv 2410.09437)
token     each token keeps some of the ranks at each layer (SMoRA, arXiv 2501.15103), as many as `keep`:
          lambda = R w / sum of w over the kept ones, w = sigmoid(W_g x), 0 for the others; with all kept alike it is 1
core      a learned matrix C [rank, rank] per layer, the identity at first, in the place of lambda: B C A x. Experts of
          one A and one B are their cores alone (CoMoL, arXiv 2603.00573)
dropout   in training every lambda of a token is 0 by that chance, and else divided by 1 - dropout: on the expert's own
          copy of A x, so that experts with one A see different parts of it (R-LoRA, arXiv 2502.15455)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moa.experts.starts import normal


@dataclass(frozen=True, kw_only=True)
class RankGates:
    kind: str = "none"
    keep: int = 1  # of kind token
    num_tasks: int = 0  # of kind task
    dropout: float = 0.0

    def start(self, rank: int, width: int, seed: str) -> Tensor | None:
        """The learned tensor of a layer: [task, rank] of ones, [rank, rank], or [rank, in]."""
        if self.kind == "core":
            return torch.eye(rank)
        if self.kind == "task":
            return torch.ones(self.num_tasks, rank)
        if self.kind == "token":
            return normal((rank, width), seed) * 0.02
        return None


def task_shares(task_ids: Int[Tensor, " batch"], num_tasks: int) -> Float[Tensor, "batch task"]:
    """1 at each sample's task; of an unknown one (-1) equal shares of all."""
    known = F.one_hot(task_ids.clamp(min=0), num_tasks).float()
    return torch.where(task_ids[:, None] >= 0, known, 1.0 / num_tasks)


def token_rank_gates(
    x: Float[Tensor, "*lead in"], router: Float[Tensor, "rank in"], keep: int
) -> Float[Tensor, "*lead rank"]:
    """`keep` of a token's ranks by their sigmoid, with mean 1 over all ranks; decided in float32."""
    with torch.autocast(x.device.type, enabled=False):
        scores = F.linear(x.float(), router.float()).sigmoid()
        kept = torch.zeros_like(scores).scatter(-1, scores.topk(keep, dim=-1).indices, 1.0) * scores
        return kept * (scores.shape[-1] / kept.sum(-1, keepdim=True))


def side_by_side(
    found: Mapping[str, Float[Tensor, "*_ rank"]], order: Sequence[tuple[str, int]], like: Tensor
) -> Float[Tensor, "*lead total"]:
    """The gates of all ranks of the experts in `order`, each with its rank; 1 for an expert without."""
    lead = torch.broadcast_shapes(*(gates.shape[:-1] for gates in found.values()))
    parts = [found.get(expert, like.new_ones(rank)).expand(*lead, rank) for expert, rank in order]
    return torch.cat(parts, dim=-1)
