"""GLM-Image's DiT, the same arithmetic in fewer and larger pieces.

Text and picture are one sequence from the first block to the last, so that each linear layer is one product; queries,
keys and values are another. What a request's forwards share (rotary tables, prior, projected text, modulations) is
computed once. Every size, mode and number of sources runs the same kernels: nothing is compiled for a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.errors import StartupError
from runtime.families.glm_image.reference import Weight
from runtime.families.glm_image.weights import EightBitLinear, fused, weight_of

ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
EPS = 1e-5


def attention_backend(setting: str, device: torch.device, dtype: torch.dtype) -> str:
    """cuDNN's on Hopper and later (on an H200 641 TFLOP/s against FlashAttention-2's 369). Before, FlashAttention-2:
    the flash-attn package's where it is installed, else PyTorch's. What PyTorch takes by itself for float32 and
    elsewhere. Raises StartupError for a `setting` that the device cannot do."""
    if setting == "flash-attn" and not find_spec("flash_attn"):
        raise StartupError("ATTENTION_BACKEND=flash-attn: the package flash-attn is not installed")
    if setting not in ("auto", "native") and device.type != "cuda":
        raise StartupError(f"ATTENTION_BACKEND={setting}: needs a CUDA device; native runs anywhere")
    if setting != "auto":
        return setting
    if device.type != "cuda" or dtype == torch.float32:
        return "native"
    if torch.cuda.get_device_capability(device) >= (9, 0):
        return "cudnn"
    return "flash-attn" if find_spec("flash_attn") else "flash"


class Denoiser:
    """Takes the place of a GlmImageTransformer2DModel's forward. `ops` is `kernels` or `reference`."""

    def __init__(self, model: Any, ops: Any, attention: str) -> None:
        self._model, self._ops, self._attention = model, ops, attention
        self._eight = isinstance(model.transformer_blocks[0].attn1.to_q, EightBitLinear)
        self._blocks = [(EightBitBlock if self._eight else Block)(block, ops) for block in model.transformer_blocks]
        self._heads = model.config.num_attention_heads
        self._size = model.config.patch_size
        self.forget()
        model.forward = self._forward

    def forget(self) -> None:
        """What one request's forwards share must not reach the next."""
        self._text, self._prior, self._modulation, self._tables = Kept(), Kept(), Kept(), Kept()

    def _forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        prior_token_id: torch.Tensor,
        prior_token_drop: torch.Tensor,
        timestep: torch.Tensor,
        target_size: torch.Tensor,
        crop_coords: torch.Tensor,
        attention_kwargs: Any = None,
        return_dict: bool = True,
        attention_mask: torch.Tensor | None = None,
        kv_caches: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if len(hidden_states) != 1 or attention_kwargs or attention_mask is not None or image_rotary_emb is not None:
            raise NotImplementedError("one picture, without what GLM-Image's pipeline never gives")
        model = self._model
        _, _, height, width = hidden_states.shape
        rows, columns = height // self._size, width // self._size
        cos, sin = self._tables(lambda: _tables(model.rope, rows, columns, hidden_states.device), rows, columns)
        text = self._text(lambda: model.glyph_projector(encoder_hidden_states), encoder_hidden_states)
        prior = self._prior(lambda: _prior(model, prior_token_id, prior_token_drop), prior_token_id, prior_token_drop)
        picture = model.image_projector(hidden_states) + prior
        modulations, final = self._modulation(
            lambda: self._modulations(timestep, target_size, crop_coords, picture.dtype),
            timestep, target_size, crop_coords,
        )  # fmt: skip
        tokens = torch.cat([text[0], picture[0]])
        with self._chosen_attention():
            drawn = self._run(tokens, text.shape[1], modulations, final, cos, sin, kv_caches)
        patches = model.proj_out(drawn).view(1, rows, columns, -1, self._size, self._size)
        output = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _run(
        self,
        tokens: torch.Tensor,
        texts: int,
        modulations: list[torch.Tensor],
        final: tuple[torch.Tensor, torch.Tensor],
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_caches: Any,
    ) -> torch.Tensor:
        ops = self._ops
        normed: Any
        befores = [(m[0], m[1]) for m in modulations]
        hidden, normed = ops.modulated(tokens, *befores[0], texts, EPS, eight=self._eight)
        del tokens
        for i, (block, following) in enumerate(zip(self._blocks, [*befores[1:], final], strict=True)):
            _, _, gate, shift, scale, gate_mlp = modulations[i]
            qkv = block.queries_keys_values(normed)
            q, k = ops.queries_keys(qkv, cos, sin, texts, self._heads, EPS)
            v = qkv[:, 2 * hidden.shape[1] :].view(k.shape)
            branch = self._attend(q, k, v, kv_caches[i] if kv_caches is not None else None)
            del qkv, q, k, v
            branch = block.out(branch)
            hidden, normed = ops.modulated(hidden, shift, scale, texts, EPS, branch, gate, self._eight)
            branch = block.feed_forward(normed)
            eight = self._eight and following is not final
            hidden, normed = ops.modulated(hidden, *following, texts, EPS, branch, gate_mlp, eight)
        found: torch.Tensor = normed[texts:]
        return found

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Any) -> torch.Tensor:
        """Of shape (tokens, width). Sources' keys and values are kept, and seen, through the pipeline's own cache."""
        k, v = k[None], v[None]
        if cache is not None and cache.mode == "write":
            cache.store(k, v.contiguous())  # not a view that keeps the queries' memory
        elif cache is not None and cache.mode == "read":
            k, v = cache.get(k, v)
        if self._attention == "flash-attn":
            from flash_attn import flash_attn_func

            found: torch.Tensor = flash_attn_func(q[None], k, v).flatten(2)[0]
            return found
        attended = F.scaled_dot_product_attention(q[None].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attended.transpose(1, 2).flatten(2)[0]

    @contextmanager
    def _chosen_attention(self) -> Iterator[None]:
        if self._attention not in ATTENTION:
            yield
            return
        with sdpa_kernel(ATTENTION[self._attention]):
            yield

    def _modulations(
        self, timestep: torch.Tensor, target_size: torch.Tensor, crop_coords: torch.Tensor, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """For each block shift, scale, gate, and those of its feed-forward network; shift and scale of the end. Each
        a pair of rows, the picture's and the text's."""
        model = self._model
        condition = model.time_condition_embed(timestep, target_size, crop_coords, dtype)
        blocks = [block.norm1.linear(condition).view(6, 2, -1) for block in model.transformer_blocks]
        scale, shift = model.norm_out.linear(condition.to(dtype)).view(2, 1, -1).expand(-1, 2, -1).contiguous()
        return blocks, (shift, scale)


class Block:
    """One block's linear layers."""

    def __init__(self, block: Any, ops: Any) -> None:
        attention, (grow, _, shrink) = block.attn1, block.ff.net
        self._ops = ops
        self._qkv = fused(attention.to_q, attention.to_k, attention.to_v)
        self._out, self._grow, self._shrink = (
            (weight_of(layer), layer.bias) for layer in (attention.to_out[0], grow.proj, shrink)
        )

    def queries_keys_values(self, x: Any) -> torch.Tensor:
        return _linear(x, *self._qkv)

    def out(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(x, *self._out)

    def feed_forward(self, x: Any) -> torch.Tensor:
        weight, bias = self._grow
        return _linear(self._ops.grown(x, weight.values, bias), *self._shrink)


class EightBitBlock(Block):
    """The same in float8: a step for each row of a weight, and for each token."""

    def queries_keys_values(self, x: Any) -> torch.Tensor:
        product: torch.Tensor = self._ops.product(x, *self._qkv)
        return product

    def out(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._ops.product(self._ops.eighth(x), *self._out)
        return product

    def feed_forward(self, x: Any) -> torch.Tensor:
        grown = self._ops.eighth(self._ops.product(x, *self._grow), gelu=True)
        product: torch.Tensor = self._ops.product(grown, *self._shrink)
        return product


def _linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.values, bias)


def _prior(model: Any, ids: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    embedding = model.prior_token_embedding(ids)
    projected: torch.Tensor = model.prior_projector(embedding * ~drop[..., None])
    return projected


def _tables(rope: Any, rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """GlmImageRotaryPosEmbed's cosines and sines of a picture's tokens: as there from the CPU, but a row and a column
    at a time, put together on the device."""
    steps = torch.arange(0, rope.dim // 2, 2, dtype=torch.float32) / (rope.dim // 2)
    frequencies = 1.0 / rope.theta**steps
    tables = []
    for turn in (torch.cos, torch.sin):
        down = turn(torch.outer(torch.arange(rows), frequencies)).to(device)[:, None].expand(rows, columns, -1)
        across = turn(torch.outer(torch.arange(columns), frequencies)).to(device)[None].expand(rows, columns, -1)
        quarter = torch.cat([down, across], dim=-1)
        tables.append(torch.cat([quarter, quarter], dim=-1).view(rows * columns, rope.dim))
    return tables[0], tables[1]


class Kept:
    """The last few results of a function by the identity of what they were made from."""

    def __init__(self, most: int = 4) -> None:
        self._most = most
        self._entries: list[tuple[tuple[Any, ...], Any]] = []

    def __call__(self, make: Callable[[], Any], *inputs: Any) -> Any:
        for known, value in self._entries:
            if all(a is b for a, b in zip(known, inputs, strict=True)):
                return value
        value = make()
        self._entries = [(inputs, value), *self._entries[: self._most - 1]]
        return value
