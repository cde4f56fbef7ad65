"""Token routers: which sites have one in common, and how the tokens of a prompt decide together.

    share     sites with one router
    site      none: each has its own
    input     q, k and v; gate and up (HMoRA, ICLR 2025)
    module    all of an attention, an MLP or a projector (MixLoRA, arXiv 2404.15159; LLaVA-MoLE, 2401.16160)
    block     all of a numbered layer

The site that runs first holds the router and decides by its own input; the others read its gates. These are an
activation, so that no module uses another's parameter: ZeRO-3 gathers what the running module itself owns.

With a router for each task, the one of its sample's task decides for a token, and the mean of all where that is unknown
(TC-MoA, CVPR 2024).

Where samples are routed too, a weight sigmoid(depth) that each router learns mixes the shares of both. Where these
choose in banks of experts, tokens weigh the banks: by w_b y_b, a learned row for each and what the bank answers.

    pool           logits of a sample from those l_t of its prompt's tokens
    prompt_mean    mean_t l_t, which a linear router gives for the mean of its inputs
    vote           log mean_t softmax(l_t): top-k of these keeps the experts with the most votes and divides
                   votes by their sum (SMoA, NAACL 2025)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moa.experts.lora_product import FactorsA, FactorsB
from moa.packing import Owners, Segments, Tokens

# what a site learns to decide by
LEARNED = ("token_router", "task_router", "token_noise", "depth", "token_query", "token_key")
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FIRST = tuple(names[0] for names in SAME_INPUT)  # they run first, whatever the order in their module
BLOCK = re.compile(r"(.*\.\d+)\.")


@dataclass(frozen=True, kw_only=True)
class TokenSite:
    """Whose router decides at a site, and the places of the site's own experts among the choices; None: all.

    `compared` are the names of these experts where the router is computed from them, see `directions`, or their
    answers have keys; `banks` is that of each, where tokens weigh banks.
    """

    leader: str
    choices: tuple[int, ...] | None = None
    compared: tuple[str, ...] = ()
    banks: tuple[int, ...] = ()
    by_task: bool = False  # a router for each task


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How the tokens of a batch decide together, by stream of sites; each sample by itself."""

    pool: str
    streams: Mapping[str, str]  # site -> stream
    weights: Mapping[str, Float[Tensor, "batch _"]]  # what each token, or row, counts in each sample's mean
    rows: Mapping[str, Int[Tensor, "*_"]]  # the sample that a token or row belongs to; a stream without: a row each

    def logits(self, site: str, logits: Float[Tensor, "*lead choice"]) -> Float[Tensor, "batch choice"]:
        """A decision per sample from the logits of a site's tokens."""
        values = logits.softmax(-1) if self.pool == "vote" else logits
        stream = self.streams[site]
        if stream != "text" and values.dim() == 3:  # rows of equally many tokens, all of the prompt
            values = values.mean(1)
        mean = self.weights[stream] @ values.flatten(0, -2)
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log() if self.pool == "vote" else mean

    def spread(self, site: str, gates: Float[Tensor, "batch expert"]) -> Float[Tensor, "*lead expert"]:
        """Gates of samples -> [rows, 1, expert], or [rows, seq, expert] in packed rows."""
        rows = self.rows.get(self.streams[site])
        gates = gates if rows is None else gates[rows]
        return gates if gates.dim() == 3 else gates[:, None]


def router_shapes(
    shape: tuple[int, int], choices: int, thresholds: int, attention: int, banks: int, tasks: int
) -> dict[str, tuple[int, ...]]:
    """What a site of this shape [out, in] learns to decide by, where it holds a router."""
    out, width = shape
    if tasks:
        return {"task_router": (tasks, choices, width)}
    if banks:
        return {"token_key": (banks, out)}
    if attention:
        return {"token_query": (attention, width), "token_key": (attention, out)}
    return {"token_router": (choices + thresholds, width)}


def pooling(
    pool: str, num_samples: int, streams: Mapping[str, str], prompt: Tokens, owners: Owners, segments: Segments = None
) -> Pooling:
    """`prompt` names the sample of each token of the text stream, -1 for one that has no vote: padding, an answer.
    `owners` names that of each row of the other streams, -1 for none; `segments` that of each token in packed rows."""
    weights = {stream: shares(owner, num_samples) for stream, owner in (("text", prompt), *owners.items())}
    rows = {stream: owner.clamp(min=0) for stream, owner in owners.items()}
    if segments is not None:
        rows["text"] = segments.clamp(min=0)
    return Pooling(pool=pool, streams=streams, weights=weights, rows=rows)


def shares(owner: Int[Tensor, "*lead"], num_samples: int) -> Float[Tensor, "batch token"]:
    """1 / n at each of a sample's n tokens, else 0."""
    member = F.one_hot(owner.flatten() + 1, num_samples + 1)[:, 1:].t().float()
    return member / member.sum(1, keepdim=True).clamp(min=1)


def leaders(choices: Mapping[str, tuple[int, ...]], streams: Mapping[str, str], share: str) -> dict[str, str]:
    """Site -> the site that decides for it: of one group, one stream and the same `choices`. Raises ValueError for a
    `share` that no two sites make use of."""
    groups = dict[tuple[str, str, tuple[int, ...]], list[str]]()
    for site, own in choices.items():
        groups.setdefault((group_of(site, share), streams[site], own), []).append(site)
    if share != "site" and all(len(members) == 1 for members in groups.values()):
        raise ValueError(f"router.share={share}: no two sites with the same experts are of one {share}; use share=site")
    found = dict[str, str]()
    for members in groups.values():
        found |= dict.fromkeys(members, min(members, key=lambda site: site.rpartition(".")[2] not in FIRST))
    return found


def group_of(site: str, share: str) -> str:
    parent, _, last = site.rpartition(".")
    block = BLOCK.match(site)
    if share == "input":
        return next((f"{parent}.{names[0]}" for names in SAME_INPUT if last in names), site)
    if share == "block" and block is not None:
        return block[1]
    return parent if share in ("module", "block") and parent else site


@torch.no_grad()
def directions(factors_a: FactorsA, factors_b: FactorsB) -> Float[Tensor, "expert in"]:
    """Arrow, a token router without training (arXiv 2405.11157, section 3.3): each expert's row in float32.

    It is v, the first right singular vector of its update B A: of all input directions of length 1 the one that the
    update answers most; zeros for an update that is zero. The logit of a token x is |v x|, since the sign of v means
    nothing. In core space: with A^T = Q R, (B A)^T B A is Q (R B^T B R^T) Q^T, a matrix of the rank's size.
    """
    rows = []
    for a, b in zip(factors_a, factors_b, strict=True):
        q, r = torch.linalg.qr(a.float().t())
        values, vectors = torch.linalg.eigh(r @ (b.float().t() @ b.float()) @ r.t())
        rows.append(q @ vectors[:, -1] * (values[-1] > 0))
    return torch.stack(rows)
