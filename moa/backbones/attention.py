"""open_clip's attention as four linear layers, which experts can wrap, and back again.

`nn.MultiheadAttention` keeps query, key and value in one Parameter, `in_proj_weight` [3 width, width], and reads its
output layer's weight without calling it: no expert around either would ever run. `split_attention` puts q_proj, k_proj,
v_proj and out_proj in its place, `pack_attention` the original names; the weights are the same bits either way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("q_proj", "k_proj", "v_proj")


class SplitAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, batch first and without returning weights."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = packed.num_heads, packed.dropout
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        for name, weight, bias in zip(PARTS, packed.in_proj_weight.chunk(3), biases, strict=True):
            setattr(self, name, _linear(weight, bias))
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.train(packed.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[batch, seq, width] and None, in the place of weights, which are not computed."""
        if need_weights:
            raise ValueError("SplitAttention gives no attention weights; pack_attention does")
        batch, length, width = query.shape
        q, k, v = (
            getattr(self, name)(x).view(batch, x.shape[1], self.num_heads, -1).transpose(1, 2)
            for name, x in zip(PARTS, (query, key, value), strict=True)
        )
        if attn_mask is not None and attn_mask.dim() == 3:  # [batch * heads, seq, seq]
            attn_mask = attn_mask.view(batch, self.num_heads, *attn_mask.shape[1:])
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)), None


def split_attention(model: nn.Module) -> list[str]:
    """Put a SplitAttention in the place of every packed one, and return their paths. Attention with other keys than
    queries in width, or with the sequence first, stays as it is."""
    packed = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        extra = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
        if module._qkv_same_embed_dim and module.batch_first and not extra:
            model.set_submodule(name, SplitAttention(module))
            packed.append(name)
    return packed


@torch.no_grad()
def pack_attention(model: nn.Module) -> None:
    """The inverse of `split_attention`: the model's state dict has its original keys again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitAttention):
            model.set_submodule(name, _packed(module))


def _packed(split: SplitAttention) -> nn.MultiheadAttention:
    weights = [getattr(split, name).weight for name in PARTS]
    biases = [getattr(split, name).bias for name in PARTS]
    sizes = weights[0].shape[1], split.num_heads, split.dropout
    packed = nn.MultiheadAttention(*sizes, bias=biases[0] is not None, batch_first=True, device="meta")
    packed.in_proj_weight = nn.Parameter(torch.cat(weights), weights[0].requires_grad)
    if biases[0] is not None:
        packed.in_proj_bias = nn.Parameter(torch.cat(biases), biases[0].requires_grad)
    packed.out_proj.weight, packed.out_proj.bias = split.out_proj.weight, split.out_proj.bias
    return packed.train(split.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer
