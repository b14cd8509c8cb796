"""The linear layers of GLM-Image's two large models as the fast path reads them: plain, or in 8 bits with the
originals gone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from runtime.families.glm_image.reference import Weight, float8, int8

KINDS: Mapping[str, Callable[[torch.Tensor], Weight]] = {"int8": int8, "float8": float8}
# What can be in 8 bits, by the names that a checkpoint has too: nearly all of both models.
TOKEN_LINEARS = re.compile(r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate_up|down)_proj)$")
DENOISER_LINEARS = re.compile(r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$")
QUERIES_KEYS_VALUES = (("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"))


class EightBitLinear(torch.nn.Module):
    """Takes the place of a linear layer. Its own forward, which reads the prompt, makes the weight whole each time."""

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: Weight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        # Buffers: a model's dtype is that of its parameters.
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", bias)

    @property
    def weight8(self) -> Weight:
        return Weight(self.values, self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight8.whole(x.dtype), self.bias)


def eight_bits(
    model: torch.nn.Module, names: re.Pattern[str], kind: str, device: torch.device, kept: torch.device | None = None
) -> None:
    """Replaces the linear layers of these names, one after another, by what `device` makes of them. It is kept there,
    or on another one; those that are 8-bit already stay."""
    for name in [name for name, module in model.named_modules() if names.search(name)]:
        parent, _, own = name.rpartition(".")
        home = model.get_submodule(parent)
        linear = getattr(home, own)
        if isinstance(linear, torch.nn.Linear):
            weight = KINDS[kind](linear.weight.detach().to(device))
            bias = None if linear.bias is None else linear.bias.detach()
            setattr(home, own, EightBitLinear(weight, bias).to(kept or device))


def weight_of(linear: Any) -> Weight:
    return linear.weight8 if isinstance(linear, EightBitLinear) else Weight(linear.weight.detach())


def fused(*linears: Any) -> tuple[Weight, torch.Tensor | None]:
    """One weight and bias for linear layers of one input. The layers' own become views of it: nothing lies twice."""
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else _joined(biases)
    if isinstance(linears[0], EightBitLinear):
        return Weight(_joined([layer.values for layer in linears]), _joined([layer.scales for layer in linears])), bias
    return Weight(_joined([layer.weight for layer in linears])), bias


def attentions(model: torch.nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """The layers of queries, keys and values that `fused` is for."""
    for module in model.modules():
        for q, k, v in QUERIES_KEYS_VALUES:
            if hasattr(module, q) and hasattr(module, k) and hasattr(module, v):
                yield getattr(module, q), getattr(module, k), getattr(module, v)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    if (whole := _neighbours(parts)) is not None:
        return whole
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, torch.split(whole, [len(part) for part in parts]), strict=True):
        part.data = view
    return whole


def _neighbours(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """The tensor that parts make which lie one behind the other in one storage."""
    first, end = parts[0].detach(), parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.dtype == first.dtype
        if not same or part.data_ptr() != end or not part.is_contiguous():
            return None
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
