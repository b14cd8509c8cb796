"""GLM-Image's language model, one token of one request at a time: on a GPU one CUDA graph over `kernels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from runtime.engine.context import Context
from runtime.families.glm_image.reference import Weight, float8, int8

CHUNK = 16  # tokens between two looks at whether to stop
AHEAD = 4  # tokens still to run when the next chunk is given to the device
WEIGHTS: Mapping[str, Callable[[torch.Tensor], Weight]] = {"plain": Weight, "int8": int8, "float8": float8}
ROOM = 4096  # positions, and new tokens, that there is room for at first; it doubles where a request needs more


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Layer:
    qkv: Weight
    qkv_bias: torch.Tensor | None
    out: Weight
    gate_up: Weight
    down: Weight
    before_attention: torch.Tensor
    after_attention: torch.Tensor
    before_mlp: torch.Tensor
    after_mlp: torch.Tensor


@dataclass(frozen=True)
class Room:
    """What grows with a request: the cache, of shape (layers, heads, positions, width); for each new token its id and
    the rotation of its position, over a head's whole width."""

    keys: torch.Tensor
    values: torch.Tensor
    scratch: Any
    ids: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class Decoder:
    """Buffers stay where they are, so that a step can be a CUDA graph. `state` counts ids sampled so far and positions
    of the prompt. `ops` is `kernels` or `reference`; `weights` names what the layers' are read as."""

    def __init__(self, encoder: Any, book: int, ops: Any, weights: str) -> None:
        self._ops, self._model = ops, encoder.model
        model, config = encoder.model.language_model, encoder.config.text_config
        self._layers = [_layer(layer, WEIGHTS[weights]) for layer in model.layers]
        self._table, self._norm, self._eps = model.embed_tokens.weight, model.norm.weight, config.rms_norm_eps
        self._head = Weight(encoder.lm_head.weight[:book])
        attention = model.layers[0].self_attn
        self._heads, self._width, self._scale = config.num_key_value_heads, attention.head_dim, attention.scaling
        self._half = 0  # of the width that turns, known with the first tables
        self._device, self._dtype = self._table.device, self._table.dtype
        self._room: Room | None = None
        self._sampling: Sampling | None = None
        self._graph: Any = None
        vocabulary = encoder.config.text_config.vision_vocab_size
        pinned = self._device.type == "cuda"
        self._drawn = torch.empty(2 * CHUNK, vocabulary, pin_memory=pinned)  # the ring that `_noise` copies
        self._noise = torch.ones(2 * CHUNK, vocabulary, device=self._device)
        self._thread = ThreadPoolExecutor(1, "noise")
        queries = config.num_attention_heads * self._width
        self._hidden, self._normed = self._vector(config.hidden_size), self._vector(config.hidden_size)
        self._branch = self._vector(config.hidden_size)
        self._qkv, self._attended = self._vector(queries + 2 * self._heads * self._width), self._vector(queries)
        self._inner, self._logits = self._vector(config.intermediate_size), self._vector(book)
        self._state = torch.zeros(2, dtype=torch.int32, device=self._device)

    def _vector(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=self._dtype, device=self._device)

    def begin(self, prefill: Any, sampling: Sampling, count: int) -> None:
        """Take over from the stock model's forward over the prompt."""
        cache = prefill.past_key_values.layers
        length = cache[0].keys.shape[-2]
        positions = self._model._cached_decode_position_ids[:, :, :count].permute(1, 0, 2).to(self._device)
        cos, sin = self._model.language_model.rotary_emb(self._hidden, position_ids=positions)
        half = cos.shape[-1] // 2
        room = self._reserve(length + count, count, sampling, half)
        room.cos[:count, : 2 * half] = cos[0]
        room.sin[:count, :half] = -sin[0, :, :half]
        room.sin[:count, half : 2 * half] = sin[0, :, half:]
        for keys, values, layer in zip(room.keys, room.values, cache, strict=True):
            keys[:, :length] = layer.keys[0]
            values[:, :length] = layer.values[0]
        self._logits.copy_(prefill.logits[0, -1, : self._logits.shape[0]])
        self._state.copy_(torch.tensor([0, length], dtype=torch.int32))

    def run(self, count: int, generator: torch.Generator, context: Context) -> torch.Tensor:
        assert self._room is not None
        drawn, mark = self._draw(0, generator), None
        for begin in range(0, count, CHUNK):
            slots = slice(begin % len(self._drawn), begin % len(self._drawn) + CHUNK)
            drawn.result()
            self._noise[slots].copy_(self._drawn[slots], non_blocking=True)
            if begin + CHUNK < count:
                drawn = self._draw(begin + CHUNK, generator)
            size = min(CHUNK, count - begin)
            for i in range(begin, begin + size):
                if i == begin + size - min(AHEAD, size):
                    mark = self._mark()
                self._sample() if i == 0 else self._step()
            if mark is not None:
                mark.synchronize()
            context.advance("tokens", begin, count) if begin else context.check()
        ids = self._room.ids[:count].clone()
        context.synchronize()
        context.advance("tokens", count, count)
        return ids[None]

    def _draw(self, begin: int, generator: torch.Generator) -> Future[None]:
        """A chunk of the ring, row by row: torch.multinomial's stream is one of calls."""

        def draw() -> None:
            for row in range(begin % len(self._drawn), begin % len(self._drawn) + CHUNK):
                self._drawn[row : row + 1].exponential_(1, generator=generator)

        return self._thread.submit(draw)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _reserve(self, positions: int, count: int, sampling: Sampling, half: int) -> Room:
        """Room for a request, and a graph over it."""
        room = self._room
        if room is None or positions > room.keys.shape[2] or count > len(room.ids):
            self._graph = self._room = room = None  # gone before the new one is made
            self._room = self._made_room(_doubled(ROOM, positions), _doubled(ROOM, count))
        if (sampling, half) != (self._sampling, self._half):
            self._graph, self._sampling, self._half = None, sampling, half
        if self._graph is None and self._device.type == "cuda":
            self._capture()
        assert self._room is not None
        return self._room

    def _made_room(self, positions: int, most: int) -> Room:
        made: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        keys = torch.zeros(len(self._layers), self._heads, positions, self._width, **made)
        cos = torch.ones(most, self._width, **made)
        return Room(
            keys,
            torch.zeros_like(keys),
            self._ops.scratch(keys, len(self._attended) // self._width),
            torch.zeros(most, dtype=torch.long, device=self._device),
            cos,
            torch.zeros_like(cos),
        )

    def _capture(self) -> None:
        self._state.fill_(1)
        self._step()  # compiles the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        self._graph = graph

    def _step(self) -> None:
        """Enqueue the forward of the last sampled id, and the next one's sampling."""
        if self._graph is not None:
            self._graph.replay()
            return
        ops, room, hidden, normed, branch = self._ops, self._room, self._hidden, self._normed, self._branch
        assert room is not None
        first = self._layers[0].before_attention
        ops.embed(room.ids, self._state, self._table, first, hidden, normed, self._eps)
        following = [*(layer.before_attention for layer in self._layers[1:]), self._norm]
        for layer, keys, values, after in zip(self._layers, room.keys, room.values, following, strict=True):
            ops.linear(normed, layer.qkv, layer.qkv_bias, self._qkv)
            ops.attend(
                self._qkv,
                room.cos,
                room.sin,
                self._half,
                keys,
                values,
                self._state,
                room.scratch,
                self._attended,
                self._scale,
            )
            ops.linear(self._attended, layer.out, None, branch)
            ops.norm(branch, hidden, layer.after_attention, layer.before_mlp, normed, self._eps)
            ops.gated(normed, layer.gate_up, self._inner)
            ops.linear(self._inner, layer.down, None, branch)
            ops.norm(branch, hidden, layer.after_mlp, after, normed, self._eps)
        ops.linear(normed, self._head, None, self._logits)
        self._sample()

    def _sample(self) -> None:
        assert self._room is not None and self._sampling is not None
        ids, chosen = self._room.ids, self._sampling
        self._ops.sample(self._logits, self._noise, ids, self._state, chosen.temperature, chosen.top_p)


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size


def _layer(layer: Any, made: Callable[[torch.Tensor], Weight]) -> Layer:
    attention = layer.self_attn
    qkv, bias = fused(attention.q_proj, attention.k_proj, attention.v_proj)
    return Layer(
        made(qkv),
        bias,
        made(attention.o_proj.weight),
        made(layer.mlp.gate_up_proj.weight),
        made(layer.mlp.down_proj.weight),
        layer.input_layernorm.weight,
        layer.post_self_attn_layernorm.weight,
        layer.post_attention_layernorm.weight,
        layer.post_mlp_layernorm.weight,
    )


def fused(*linears: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and bias for linear layers of one input. The layers' own become views of it: nothing lies twice."""
    joined: list[torch.Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, torch.split(whole, [len(part) for part in parts]), strict=True):
            part.data = view
        joined.append(whole)
    assert joined[0] is not None
    return joined[0], joined[1]
