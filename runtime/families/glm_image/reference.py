"""What the kernels of `kernels.py` compute, in plain PyTorch: for devices without Triton, and for their tests.

Modulations come as pairs of rows: the picture's, then the text's. The token stage's tensors have a row for each request
first; its `state` holds how many ids are sampled, how many positions the prompt took, and how many ids are wanted: a
row that has them all stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Weight:
    """A matrix, or one of 8-bit numbers with what each row's are multiples of."""

    values: torch.Tensor
    scales: torch.Tensor | None = None

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        if self.scales is None:
            return self.values
        return (self.values.float() * self.scales.view(-1, 1)).to(dtype)


def int8(weight: torch.Tensor) -> Weight:
    wide, scales = _scaled(weight, 127)
    return Weight(wide.round().to(torch.int8), scales)


def float8(weight: torch.Tensor) -> Weight:
    wide, scales = _scaled(weight, E4M3_MAX)
    return Weight(wide.to(torch.float8_e4m3fn), scales)


def _scaled(weight: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = weight.detach().float()
    scales = wide.abs().amax(1).clamp_min(1e-12) / most
    return wide / scales[:, None], scales


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def embed(
    ids: torch.Tensor,
    state: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    out: torch.Tensor,
    eps: float,
) -> None:
    """The last sampled id's row of `table`, and its norm."""
    hidden.copy_(table[ids.gather(1, state[:, :1].long() - 1)[:, 0]])
    out.copy_(_rms(hidden, weight, eps))


def norm(
    x: torch.Tensor, hidden: torch.Tensor, post: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    """Adds the norm of `x` to `hidden`; `out` is the norm of that."""
    hidden.add_(_rms(x, post, eps))
    out.copy_(_rms(hidden, weight, eps))


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    out.copy_(F.linear(x, weight.whole(x.dtype), bias))


def gated(x: torch.Tensor, weight: Weight, out: torch.Tensor) -> None:
    """`weight` holds the gate's rows, then as many of the values it gates."""
    gate, up = F.linear(x, weight.whole(x.dtype)).chunk(2, dim=-1)
    out.copy_(up * F.silu(gate))


def attend(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    half: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    state: torch.Tensor,
    scratch: object,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Rotates the new token's queries and keys, puts it in the cache (heads, positions, width) and attends to all."""
    _, heads, _, width = keys.shape
    for row, (done, length, _) in enumerate(state.tolist()):
        position = length + done - 1
        q, k, v = torch.split(qkv[row].view(-1, width), [out.shape[-1] // width, heads, heads])
        c, s = cos[row, done - 1], sin[row, done - 1]
        keys[row, :, position] = _rotated(k, c, s, half)
        values[row, :, position] = v
        attended = F.scaled_dot_product_attention(
            _rotated(q, c, s, half).view(1, -1, 1, width),
            keys[row : row + 1, :, : position + 1],
            values[row : row + 1, :, : position + 1],
            scale=scale,
            enable_gqa=True,
        )
        out[row] = attended.flatten()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int) -> torch.Tensor:
    """`sin` has the sign of the half it is for; beyond twice `half` nothing turns."""
    partner = torch.cat([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], dim=-1)
    return x * cos + partner * sin


def scratch(keys: torch.Tensor, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    return keys.new_empty(0), keys.new_empty(0)


def sample(
    logits: torch.Tensor,
    noise: torch.Tensor,
    ids: torch.Tensor,
    state: torch.Tensor,
    temperature: float,
    top_p: float,
) -> None:
    """Writes the next id as transformers' top-p sampling draws it: argmax of probability over exponential noise.

    `noise` is a ring of the whole vocabulary's, for each row; `logits` are the code book's alone.
    """
    for row, (done, _, wanted) in enumerate(state.tolist()):
        if done >= wanted:
            continue
        scores = logits[row].float() / temperature
        if top_p < 1.0:
            ordered, order = torch.sort(scores)
            dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
            dropped[-1] = False
            scores = scores.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), float("-inf"))
        ids[row, done] = (scores.softmax(-1) / noise[done % len(noise), row, : logits.shape[-1]]).argmax()
        state[row, 0] += 1


def modulated(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    texts: int,
    eps: float,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | Weight]:
    """`x` plus the gated branch, and its layer norm, scaled and shifted, with `eight` in float8. The first `texts`
    rows are the text's."""
    text = (torch.arange(x.shape[0], device=x.device) < texts).long()
    hidden = x if branch is None or gate is None else x + branch * gate[text]
    out = F.layer_norm(hidden, hidden.shape[-1:], eps=eps) * (1 + scale[text]) + shift[text]
    return hidden, float8(out) if eight else out


def eighth(x: torch.Tensor, gelu: bool = False) -> Weight:
    """`x`, or the tanh form of its GELU, in float8."""
    return float8(F.gelu(x, approximate="tanh") if gelu else x)


def product(x: Weight, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer of a float8 input and weight."""
    found = F.linear(x.whole(torch.float32), weight.whole(torch.float32))
    return found if bias is None else (found + bias).to(bias.dtype)


def queries_keys(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, texts: int, heads: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm over each head of queries and keys; the picture's are turned."""
    tokens = qkv.shape[0]
    q, k, _ = qkv.view(tokens, 3, heads, -1).unbind(1)
    return _turned(q, cos, sin, texts, eps), _turned(k, cos, sin, texts, eps)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, texts: int, eps: float) -> torch.Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    picture = normed[texts:]
    one, other = picture.chunk(2, dim=-1)
    turned = picture.float() * cos[:, None] + torch.cat([-other, one], dim=-1).float() * sin[:, None]
    return torch.cat([normed[:texts], turned.to(x.dtype)])


def grown(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The feed-forward network's first half: a linear layer and the tanh form of GELU."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
