"""GLM-Image's language model, one token of each request at a time: on a GPU one CUDA graph over `kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from runtime.engine.context import Context
from runtime.families.glm_image.reference import Weight
from runtime.families.glm_image.weights import fused, weight_of

CHUNK = 16  # tokens between two looks at whether to stop
AHEAD = 4  # tokens still to run when the next chunk is given to the device
MOST_ROWS = 64  # more do not fit into a block's shared memory
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
class Prompt:
    """What the stock model's forward over a request's prompt leaves: keys and values by layer, of shape (heads,
    positions, width), the logits of the first new token, and of all `count` new ones the positions, (3, 1, count)."""

    cache: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    logits: torch.Tensor
    positions: torch.Tensor
    count: int
    sampling: Sampling

    @property
    def length(self) -> int:
        return self.cache[0][0].shape[1]


@dataclass(frozen=True)
class Room:
    """What grows with a request: the cache, of shape (layers, rows, heads, positions, width); for each row's new tokens
    their ids and the rotation of their positions, over a head's whole width."""

    keys: torch.Tensor
    values: torch.Tensor
    scratch: Any
    ids: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class Decoder:
    """Buffers stay where they are, so that a step can be a CUDA graph. It always has `rows` rows: a request's tokens do
    not depend on how many others there are. `ops` is `kernels` or `reference`."""

    def __init__(self, encoder: Any, book: int, ops: Any, rows: int) -> None:
        self._ops, self._model = ops, encoder.model
        model, config = encoder.model.language_model, encoder.config.text_config
        self._layers = [_layer(layer) for layer in model.layers]
        self._table, self._norm, self._eps = model.embed_tokens.weight, model.norm.weight, config.rms_norm_eps
        self._head = Weight(encoder.lm_head.weight[:book])
        attention = model.layers[0].self_attn
        self._heads, self._width, self._scale = config.num_key_value_heads, attention.head_dim, attention.scaling
        self._half = 0  # of the width that turns, known with the first tables
        self._device, self._dtype, self.rows = self._table.device, self._table.dtype, rows
        self._room: Room | None = None
        self._sampling: Sampling | None = None
        self._graph: Any = None
        self._at = 0  # where the weights were that the graph reads
        vocabulary = encoder.config.text_config.vision_vocab_size
        pinned = self._device.type == "cuda"
        self._drawn = torch.ones(2 * CHUNK, rows, vocabulary, pin_memory=pinned)  # the ring that `_noise` copies
        self._noise = torch.ones(2 * CHUNK, rows, vocabulary, device=self._device)
        self._thread = ThreadPoolExecutor(1, "noise")
        queries = config.num_attention_heads * self._width
        self._hidden, self._normed = self._vector(config.hidden_size), self._vector(config.hidden_size)
        self._branch = self._vector(config.hidden_size)
        self._qkv, self._attended = self._vector(queries + 2 * self._heads * self._width), self._vector(queries)
        self._inner, self._logits = self._vector(config.intermediate_size), self._vector(book)
        self._state = torch.ones(rows, 3, dtype=torch.int32, device=self._device)  # as `reference` has it

    def _vector(self, size: int) -> torch.Tensor:
        return torch.zeros(self.rows, size, dtype=self._dtype, device=self._device)

    def prompt(self, prefill: Any, count: int, sampling: Sampling) -> Prompt:
        """What the stock model's forward over one prompt found, before the next one's takes its place."""
        cache = tuple((layer.keys[0], layer.values[0]) for layer in prefill.past_key_values.layers)
        positions = self._model._cached_decode_position_ids[:, :, :count].permute(1, 0, 2).to(self._device)
        return Prompt(cache, prefill.logits[0, -1, : self._logits.shape[1]].clone(), positions, count, sampling)

    def run(
        self, prompts: Sequence[Prompt], generators: Sequence[torch.Generator], context: Context
    ) -> list[torch.Tensor]:
        """Each prompt's `count` ids, of shape (count,). Up to `rows` prompts, of one sampling; each row's noise is its
        generator's."""
        try:
            return self._run(prompts, generators, context)
        finally:
            if self._room is not None and self._room.keys.shape[3] > ROOM:  # one long prompt's room, for every row
                context.synchronize()  # a cancel leaves steps in flight
                self._room = self._graph = None

    def _run(
        self, prompts: Sequence[Prompt], generators: Sequence[torch.Generator], context: Context
    ) -> list[torch.Tensor]:
        self._begin(prompts)
        assert self._room is not None
        counts = [prompt.count for prompt in prompts]
        count = max(counts)
        noise = list(zip(generators, counts, strict=True))
        drawn, mark = self._draw(0, noise), None
        for begin in range(0, count, CHUNK):
            slots = slice(begin % len(self._drawn), begin % len(self._drawn) + CHUNK)
            drawn.result()
            self._noise[slots].copy_(self._drawn[slots], non_blocking=True)
            if begin + CHUNK < count:
                drawn = self._draw(begin + CHUNK, noise)
            size = min(CHUNK, count - begin)
            for i in range(begin, begin + size):
                if i == begin + size - min(AHEAD, size):
                    mark = self._mark()
                self._sample() if i == 0 else self._step()
            if mark is not None:
                mark.synchronize()
            context.advance("tokens", begin, count) if begin else context.check()
        ids = [row[:own].clone() for row, own in zip(self._room.ids, counts, strict=False)]
        context.synchronize()
        context.advance("tokens", count, count)
        return ids

    def _begin(self, prompts: Sequence[Prompt]) -> None:
        tables = [self._model.language_model.rotary_emb(self._hidden, position_ids=p.positions) for p in prompts]
        half = tables[0][0].shape[-1] // 2
        positions, count = max(p.length + p.count for p in prompts), max(p.count for p in prompts)
        room = self._reserve(positions, count, prompts[0].sampling, half)
        state = torch.ones(self.rows, 3, dtype=torch.int32)  # rows without a request want nothing more
        for row, (prompt, (cos, sin)) in enumerate(zip(prompts, tables, strict=True)):
            length, count = prompt.length, prompt.count
            room.cos[row, :count, : 2 * half] = cos[0]
            room.sin[row, :count, :half] = -sin[0, :, :half]
            room.sin[row, :count, half : 2 * half] = sin[0, :, half:]
            for keys, values, (own_keys, own_values) in zip(room.keys, room.values, prompt.cache, strict=True):
                keys[row, :, :length] = own_keys
                values[row, :, :length] = own_values
            self._logits[row] = prompt.logits
            state[row] = torch.tensor([0, length, count])
        self._state.copy_(state)

    def _draw(self, begin: int, noise: Sequence[tuple[torch.Generator, int]]) -> Future[None]:
        """A chunk of the ring, token by token: torch.multinomial's stream is one of calls."""

        def draw() -> None:
            slot = begin % len(self._drawn)
            for row, (generator, count) in enumerate(noise):
                if begin < count:
                    for i in range(slot, slot + CHUNK):
                        self._drawn[i, row : row + 1].exponential_(1, generator=generator)

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
        if room is None or positions > room.keys.shape[3] or count > room.ids.shape[1]:
            self._graph = self._room = room = None  # gone before the new one is made
            self._room = self._made_room(_doubled(ROOM, positions), _doubled(ROOM, count))
        at = self._table.data_ptr()
        if (sampling, half, at) != (self._sampling, self._half, self._at):
            self._graph, self._sampling, self._half, self._at = None, sampling, half, at
        if self._graph is None and self._device.type == "cuda":
            self._capture()
        assert self._room is not None
        return self._room

    def _made_room(self, positions: int, most: int) -> Room:
        made: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        keys = torch.zeros(len(self._layers), self.rows, self._heads, positions, self._width, **made)
        cos = torch.ones(self.rows, most, self._width, **made)
        return Room(
            keys,
            torch.zeros_like(keys),
            self._ops.scratch(keys, self._attended.shape[1] // self._width),
            torch.zeros(self.rows, most, dtype=torch.long, device=self._device),
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
        """Enqueue the forward of the last sampled ids, and the next ones' sampling."""
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


def _layer(layer: Any) -> Layer:
    attention = layer.self_attn
    qkv, bias = fused(attention.q_proj, attention.k_proj, attention.v_proj)
    return Layer(
        qkv,
        bias,
        weight_of(attention.o_proj),
        weight_of(layer.mlp.gate_up_proj),
        weight_of(layer.mlp.down_proj),
        layer.input_layernorm.weight,
        layer.post_self_attn_layernorm.weight,
        layer.post_attention_layernorm.weight,
        layer.post_mlp_layernorm.weight,
    )
