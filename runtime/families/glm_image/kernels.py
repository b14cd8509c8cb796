# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""GPU kernels of GLM-Image's two models, in Triton. `reference.py` says what each computes.

Values are rounded to the weights' type where the stock modules round them: a fast picture differs from a stock one
by the order of sums. The token stage's kernels run in one graph a token; they chain by programmatic dependent launch:
a kernel begins while the one before ends, and waits (`_wait`) before it touches what others write.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from runtime.families.glm_image.reference import Weight

Tile = TypeVar("Tile", bound=tuple[int, ...])

SPLIT = 64  # cached positions that one program of the token stage's attention reads


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()


@triton.jit
def _rms(x, n, eps, weight, dtype: tl.constexpr):
    """As GlmImageRMSNorm: rounded before and after the weight."""
    scaled = (x * tl.rsqrt(tl.sum(x * x, 0) / n + eps)).to(dtype).to(tl.float32)
    return (scaled * weight).to(dtype)


# --- the token stage: a row for each request ---


@triton.jit
def _embed_kernel(ids, state, table, weight, hidden, out, n, most, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    w = tl.load(weight + cols, mask, other=0.0).to(tl.float32)
    _wait(PDL)
    token = tl.load(ids + row * most + tl.load(state + row * 3) - 1)
    x = tl.load(table + token.to(tl.int64) * n + cols, mask, other=0.0)
    tl.store(hidden + row * n + cols, x, mask)
    tl.store(out + row * n + cols, _rms(x.to(tl.float32), n, eps, w, out.dtype.element_ty), mask)


@triton.jit
def _norm_kernel(x, hidden, post, weight, out, n, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    here = tl.program_id(0) * n + cols
    mask = cols < n
    w_post = tl.load(post + cols, mask, other=0.0).to(tl.float32)
    w = tl.load(weight + cols, mask, other=0.0).to(tl.float32)
    _wait(PDL)
    dtype: tl.constexpr = out.dtype.element_ty
    branch = _rms(tl.load(x + here, mask, other=0.0).to(tl.float32), n, eps, w_post, dtype).to(tl.float32)
    total = (tl.load(hidden + here, mask, other=0.0).to(tl.float32) + branch).to(dtype)
    tl.store(hidden + here, total, mask)
    tl.store(out + here, _rms(total.to(tl.float32), n, eps, w, dtype), mask)


@triton.jit
def _linear_kernel(
    x, weight, scales, bias, out, K, N,
    SCALED: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    inside = rows < N
    base = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
    # The first block of weights is on its way before the kernel before is done.
    first = tl.load(base, inside[:, None] & (cols < K)[None, :], other=0.0, eviction_policy="evict_first")
    _wait(PDL)
    v = tl.load(x + cols, cols < K, other=0.0).to(tl.float32)
    acc = first.to(tl.float32) * v[None, :]
    for k in range(BLOCK_K, K, BLOCK_K):
        if EVEN:
            w = tl.load(base + k, inside[:, None], other=0.0, eviction_policy="evict_first")
            v = tl.load(x + k + cols).to(tl.float32)
        else:
            w = tl.load(base + k, inside[:, None] & (k + cols < K)[None, :], other=0.0, eviction_policy="evict_first")
            v = tl.load(x + k + cols, k + cols < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * v[None, :]
    total = tl.sum(acc, 1)
    if SCALED:
        total *= tl.load(scales + rows, inside, other=0.0)
    if BIAS:
        total += tl.load(bias + rows, inside, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty), inside)


@triton.jit
def _gated_kernel(
    x, weight, scales, out, K, N,
    SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    inside = rows < N
    base = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
    up_base = base + tl.cast(N, tl.int64) * K
    begun = inside[:, None] & (cols < K)[None, :]
    g = tl.load(base, begun, other=0.0, eviction_policy="evict_first")
    u = tl.load(up_base, begun, other=0.0, eviction_policy="evict_first")
    _wait(PDL)
    v = tl.load(x + cols, cols < K, other=0.0).to(tl.float32)
    gate = g.to(tl.float32) * v[None, :]
    up = u.to(tl.float32) * v[None, :]
    for k in range(BLOCK_K, K, BLOCK_K):
        if EVEN:
            v = tl.load(x + k + cols).to(tl.float32)
            mask = inside[:, None]
        else:
            v = tl.load(x + k + cols, k + cols < K, other=0.0).to(tl.float32)
            mask = inside[:, None] & (k + cols < K)[None, :]
        gate += tl.load(base + k, mask, other=0.0, eviction_policy="evict_first").to(tl.float32) * v[None, :]
        up += tl.load(up_base + k, mask, other=0.0, eviction_policy="evict_first").to(tl.float32) * v[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    gates, ups = tl.sum(gate, 1), tl.sum(up, 1)
    if SCALED:
        gates *= tl.load(scales + rows, inside, other=0.0)
        ups *= tl.load(scales + N + rows, inside, other=0.0)
    gates = gates.to(dtype).to(tl.float32)
    silu = (gates / (1.0 + tl.exp(-gates))).to(dtype).to(tl.float32)
    tl.store(out + rows, (ups.to(dtype).to(tl.float32) * silu).to(dtype), inside)


@triton.jit
def _rows_linear_kernel(
    x, weight, scales, bias, out, K, N, M,
    SCALED: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As `_linear_kernel` for M rows of `x`: each row's sums are its own, whatever the others hold."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m = tl.arange(0, ROWS)
    inside = (n < N)[:, None]
    rows = (m < M)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    base = weight + n[:, None].to(tl.int64) * K + k[None, :]
    x_at = x + m[None, :] * K + k[:, None]
    first = tl.load(base, inside & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    _wait(PDL)
    v = tl.load(x_at, rows & (k < K)[:, None], other=0.0)
    acc = tl.dot(first.to(dtype), v, input_precision="ieee")
    for at in range(BLOCK_K, K, BLOCK_K):
        w = tl.load(base + at, inside & (at + k < K)[None, :], other=0.0, eviction_policy="evict_first")
        v = tl.load(x_at + at, rows & (at + k < K)[:, None], other=0.0)
        acc = tl.dot(w.to(dtype), v, acc, input_precision="ieee")
    if SCALED:
        acc *= tl.load(scales + n, n < N, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out + m[None, :] * N + n[:, None], acc.to(dtype), rows & inside)


@triton.jit
def _rows_gated_kernel(
    x, weight, scales, out, K, N, M,
    SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m = tl.arange(0, ROWS)
    inside = (n < N)[:, None]
    rows = (m < M)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    base = weight + n[:, None].to(tl.int64) * K + k[None, :]
    up_base = base + tl.cast(N, tl.int64) * K
    x_at = x + m[None, :] * K + k[:, None]
    begun = inside & (k < K)[None, :]
    g = tl.load(base, begun, other=0.0, eviction_policy="evict_first")
    u = tl.load(up_base, begun, other=0.0, eviction_policy="evict_first")
    _wait(PDL)
    v = tl.load(x_at, rows & (k < K)[:, None], other=0.0)
    gate = tl.dot(g.to(dtype), v, input_precision="ieee")
    up = tl.dot(u.to(dtype), v, input_precision="ieee")
    for at in range(BLOCK_K, K, BLOCK_K):
        v = tl.load(x_at + at, rows & (at + k < K)[:, None], other=0.0)
        mask = inside & (at + k < K)[None, :]
        g = tl.load(base + at, mask, other=0.0, eviction_policy="evict_first")
        u = tl.load(up_base + at, mask, other=0.0, eviction_policy="evict_first")
        gate = tl.dot(g.to(dtype), v, gate, input_precision="ieee")
        up = tl.dot(u.to(dtype), v, up, input_precision="ieee")
    if SCALED:
        gate *= tl.load(scales + n, n < N, other=0.0)[:, None]
        up *= tl.load(scales + N + n, n < N, other=0.0)[:, None]
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + m[None, :] * N + n[:, None], (up.to(dtype).to(tl.float32) * silu).to(dtype), rows & inside)


@triton.jit
def _rotated(x, partner, cos, sin, dtype: tl.constexpr):
    return ((x * cos).to(dtype).to(tl.float32) + (partner * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _attend_kernel(
    qkv, cos, sin, keys, values, state, acc_out, stat_out, scale, capacity, most, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    SPLIT_: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One key head and SPLIT_ cached positions: the group's queries against them, not yet divided by the sum."""
    kv_head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _wait(PDL)
    done = tl.load(state + request * 3)
    position = tl.load(state + request * 3 + 1) + done - 1  # where the token fed now stands in the cache
    if split * SPLIT_ > position:
        return
    dtype: tl.constexpr = qkv.dtype.element_ty
    qkv += request * (HEADS * (GROUP + 2) * D)
    cos += request * most * D
    sin += request * most * D
    keys += request.to(tl.int64) * HEADS * capacity * D
    values += request.to(tl.int64) * HEADS * capacity * D
    d = tl.arange(0, D)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    c = tl.load(cos + (done - 1) * D + d).to(tl.float32)
    s = tl.load(sin + (done - 1) * D + d).to(tl.float32)

    row = tl.arange(0, ROWS)
    q_at = qkv + (kv_head * GROUP + row)[:, None] * D
    in_group = (row < GROUP)[:, None]
    q = _rotated(
        tl.load(q_at + d[None, :], in_group, other=0.0).to(tl.float32),
        tl.load(q_at + partner[None, :], in_group, other=0.0).to(tl.float32),
        c[None, :], s[None, :], dtype,
    )  # fmt: skip
    k_at = qkv + (HEADS * GROUP + kv_head) * D
    v_at = k_at + HEADS * D
    new_k = _rotated(tl.load(k_at + d).to(tl.float32), tl.load(k_at + partner).to(tl.float32), c, s, dtype)
    new_v = tl.load(v_at + d)

    at = split * SPLIT_ + tl.arange(0, SPLIT_)
    cached = (at < position)[:, None]
    newest = (at == position)[:, None]
    offset = (kv_head * capacity + at)[:, None].to(tl.int64) * D + d[None, :]
    k = tl.where(newest, new_k[None, :], tl.load(keys + offset, cached, other=0.0))
    v = tl.where(newest, new_v[None, :], tl.load(values + offset, cached, other=0.0))
    if (position // SPLIT_) == split:
        here = (kv_head * capacity + position).to(tl.int64) * D + d
        tl.store(keys + here, new_k)
        tl.store(values + here, new_v)

    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where((at <= position)[None, :], scores, float("-inf"))
    most = tl.max(scores, 1)
    p = tl.exp(scores - most[:, None])
    acc = tl.dot(p.to(dtype), v, input_precision="ieee")
    head = (request * HEADS + kv_head) * GROUP + row
    slot = head * splits + split
    tl.store(acc_out + slot[:, None] * D + d[None, :], acc, in_group)
    tl.store(stat_out + slot * 2, most, row < GROUP)
    tl.store(stat_out + slot * 2 + 1, tl.sum(p, 1), row < GROUP)


@triton.jit
def _combine_kernel(
    acc, stat, state, out, splits, D: tl.constexpr, SPLIT_: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr
):
    """One query head: the splits' sums put together."""
    request = tl.program_id(1)
    head = request * tl.num_programs(0) + tl.program_id(0)
    d = tl.arange(0, D)
    _wait(PDL)
    used = (tl.load(state + request * 3 + 1) + tl.load(state + request * 3) - 1) // SPLIT_ + 1
    most = -float("inf")
    total = 0.0
    summed = tl.zeros([D], tl.float32)
    for begin in range(0, used, CHUNK):
        i = begin + tl.arange(0, CHUNK)
        m = tl.load(stat + (head * splits + i) * 2, i < used, other=-float("inf"))
        n = tl.load(stat + (head * splits + i) * 2 + 1, i < used, other=0.0)
        a = tl.load(acc + (head * splits + i)[:, None] * D + d[None, :], (i < used)[:, None], other=0.0)
        higher = tl.maximum(most, tl.max(m, 0))
        weight = tl.exp(m - higher)
        fade = tl.exp(most - higher)
        total = total * fade + tl.sum(n * weight, 0)
        summed = summed * fade + tl.sum(a * weight[:, None], 0)
        most = higher
    tl.store(out + head * D + d, (summed / total).to(out.dtype.element_ty))


@triton.jit
def _sample_kernel(
    logits, noise, ids, state, vocabulary, book, most, temperature, cut,
    RING: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The id that argmax(probability / noise) over the top-p set gives, without sorting: the best id is taken unless
    the ids up to it, from the least probable on (the lower id first among equals), hold no more than `cut`."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < book
    _wait(PDL)
    done = tl.load(state + row * 3)
    if done >= tl.load(state + row * 3 + 2):
        return
    drawn = tl.load(noise + ((done % RING) * tl.num_programs(0) + row) * vocabulary + at, mask, other=1.0)
    scores = tl.load(logits + row * book + at, mask, other=-float("inf")).to(tl.float32) / temperature
    p = tl.exp(scores - tl.max(scores, 0))
    p = p / tl.sum(p, 0)
    ratio = tl.where(mask, p / drawn, -1.0)
    top = tl.max(tl.where(p == tl.max(p, 0), at, -1), 0)  # kept whatever `cut` is
    best = tl.argmax(ratio, 0)
    looking = best != top
    while looking:
        own = tl.sum(tl.where(at == best, p, 0.0), 0)
        below = tl.sum(tl.where((p < own) | ((p == own) & (at <= best)), p, 0.0), 0)
        dropped = below <= cut
        ratio = tl.where(dropped, tl.where(at == best, -1.0, ratio), ratio)
        best = tl.argmax(ratio, 0)
        looking = tl.where(dropped, best != top, False)
    tl.store(ids + row * most + done, best.to(ids.dtype.element_ty))
    tl.store(state + row * 3, done + 1)


# --- the DiT ---


@triton.jit
def _store_eight(x, out, step_out, mask):
    """A row in float8, and the step that its largest value makes."""
    step = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / 448.0
    tl.store(out, (x / step).to(out.dtype.element_ty), mask)
    tl.store(step_out, step)


@triton.jit
def _eight_kernel(x, out, steps, n, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """One row in float8; with GELU its tanh form of that."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    v = tl.load(x + row * n + cols, mask, other=0.0).to(tl.float32)
    if GELU:
        v = v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
        v = tl.where(mask, v, 0.0)
    _store_eight(v, out + row * n + cols, steps + row, mask)


@triton.jit(do_not_specialize=["texts"])
def _modulated_kernel(
    x, branch, gate, shift, scale, hidden_out, out, steps, texts, n, eps,
    GATED: tl.constexpr, EIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: the gated branch added, then the layer norm, scaled and shifted. Each modulation is a pair of
    rows, the picture's and the text's."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    mine = tl.where(token < texts, n, 0) + cols
    dtype: tl.constexpr = x.dtype.element_ty
    h = tl.load(x + token * n + cols, mask, other=0.0).to(tl.float32)
    if GATED:
        b = tl.load(branch + token * n + cols, mask, other=0.0).to(tl.float32)
        g = tl.load(gate + mine, mask, other=0.0).to(tl.float32)
        h = (h + (b * g).to(dtype).to(tl.float32)).to(dtype)
        tl.store(hidden_out + token * n + cols, h, mask)
        h = h.to(tl.float32)
    mean = tl.sum(h, 0) / n
    centred = tl.where(mask, h - mean, 0.0)
    normed = (centred * tl.rsqrt(tl.sum(centred * centred, 0) / n + eps)).to(dtype).to(tl.float32)
    grown = (1.0 + tl.load(scale + mine, mask, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    scaled = (normed * grown).to(dtype).to(tl.float32)
    shifted = (scaled + tl.load(shift + mine, mask, other=0.0).to(tl.float32)).to(dtype)
    if EIGHT:
        _store_eight(shifted.to(tl.float32), out + token * n + cols, steps + token, mask)
    else:
        tl.store(out + token * n + cols, shifted, mask)


@triton.jit(do_not_specialize=["texts"])
def _qk_kernel(
    qkv, cos, sin, q_out, k_out, texts, heads, eps, D: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr
):
    """One token, ROWS heads of queries or of keys: the layer norm over a head, then the rotation of the picture's."""
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(2)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    partner = (d + D // 2) % D
    inside = (head < heads)[:, None]
    dtype: tl.constexpr = qkv.dtype.element_ty
    at = qkv + (token * 3 + which) * HEADS * D + head[:, None] * D
    x = tl.load(at + d[None, :], inside, other=0.0).to(tl.float32)
    y = tl.load(at + partner[None, :], inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / D
    spread = tl.rsqrt(tl.sum((x - mean[:, None]) * (x - mean[:, None]), 1) / D + eps)
    x = ((x - mean[:, None]) * spread[:, None]).to(dtype).to(tl.float32)
    y = ((y - mean[:, None]) * spread[:, None]).to(dtype).to(tl.float32)
    pictured = (d >= 0) & (token >= texts)
    place = (token - texts) * D + d
    c = tl.load(cos + place, pictured, other=1.0)
    s = tl.load(sin + place, pictured, other=0.0)
    turned = (x * c[None, :] + tl.where(d < D // 2, -1.0, 1.0)[None, :] * y * s[None, :]).to(dtype)
    here = token * HEADS * D + head[:, None] * D + d[None, :]
    if which == 0:
        tl.store(q_out + here, turned, inside)
    else:
        tl.store(k_out + here, turned, inside)


# --- what `reference.py` says, on a GPU ---

# Rows and columns of a weight that one program reads at a time, and its warps: by (rows, columns, bytes of a number),
# as measured on an H200; by the bytes alone for every other.
LINEAR: dict[tuple[int, ...], tuple[int, int, int]] = {
    (2,): (4, 2048, 4),
    (4608, 4096, 2): (1, 4096, 4),
    (16384, 4096, 2): (1, 4096, 4),
    (1,): (8, 1024, 4),
    (4608, 4096, 1): (2, 2048, 4),
    (4,): (4, 1024, 4),
}
GATED: dict[tuple[int, ...], tuple[int, int, int]] = {(2,): (2, 2048, 4), (1,): (8, 1024, 8), (4,): (2, 1024, 4)}
# The same for several rows, with the stages of their loop. By shape where a block has Hopper's shared memory.
ROWS_LINEAR: dict[tuple[int, ...], tuple[int, int, int, int]] = {
    (2,): (32, 128, 4, 3),
    (4608, 4096, 2): (64, 128, 4, 4),
    (4096, 4096, 2): (64, 128, 4, 6),
    (4096, 13696, 2): (32, 512, 4, 3),
    (16384, 4096, 2): (64, 128, 4, 4),
    (1,): (32, 128, 4, 3),
    (4608, 4096, 1): (32, 512, 4, 3),
    (4096, 4096, 1): (32, 512, 4, 3),
    (4096, 13696, 1): (32, 512, 4, 3),
    (16384, 4096, 1): (64, 128, 4, 4),
    (4,): (32, 64, 4, 2),
}
ROWS_GATED: dict[tuple[int, ...], tuple[int, int, int, int]] = {
    (2,): (32, 128, 4, 3),
    (13696, 4096, 2): (64, 128, 4, 4),
    (1,): (32, 128, 4, 3),
    (13696, 4096, 1): (64, 128, 4, 4),
    (4,): (16, 64, 4, 2),
}
ROOMY = 200 * 2**10  # bytes of shared memory


def _options(pdl: bool) -> dict[str, Any]:
    return {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}


def _tile(table: dict[tuple[int, ...], Tile], n: int, k: int, weight: Weight, measured: bool = True) -> Tile:
    size = weight.values.itemsize
    return table[(n, k, size)] if measured and (n, k, size) in table else table[(size,)]


def _measured(x: torch.Tensor) -> bool:
    """Whether the tiles that were measured fit: with eight rows, on a card with Hopper's shared memory."""
    if x.device.type != "cuda" or len(x) > 32:
        return False
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    limit: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return limit >= ROOMY


def chains(device: torch.device) -> bool:
    """Whether kernels may begin before the one before has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def embed(
    ids: torch.Tensor,
    state: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    out: torch.Tensor,
    eps: float,
) -> None:
    rows, n = hidden.shape
    block, most = triton.next_power_of_2(n), ids.shape[1]
    options = _options(chains(out.device))
    _embed_kernel[(rows,)](ids, state, table, weight, hidden, out, n, most, eps, BLOCK=block, num_warps=8, **options)


def norm(
    x: torch.Tensor, hidden: torch.Tensor, post: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    rows, n = hidden.shape
    block = triton.next_power_of_2(n)
    options = _options(chains(out.device))
    _norm_kernel[(rows,)](x, hidden, post, weight, out, n, eps, BLOCK=block, num_warps=8, **options)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    n, k = weight.values.shape
    scaled, biased = weight.scales is not None, bias is not None
    scales, bias = weight.scales if weight.scales is not None else x, bias if bias is not None else x
    options = _options(chains(out.device))
    if len(x) > 1:
        block_n, block_k, warps, stages = _tile(ROWS_LINEAR, n, k, weight, _measured(x))
        _rows_linear_kernel[(triton.cdiv(n, block_n),)](
            x,
            weight.values,
            scales,
            bias,
            out,
            k,
            n,
            len(x),
            SCALED=scaled,
            BIAS=biased,
            ROWS=max(16, triton.next_power_of_2(len(x))),
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
            **options,
        )
        return
    block_n, block_k, warps = _tile(LINEAR, n, k, weight)
    _linear_kernel[(triton.cdiv(n, block_n),)](
        x,
        weight.values,
        scales,
        bias,
        out,
        k,
        n,
        SCALED=scaled,
        BIAS=biased,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN=k % block_k == 0,
        num_warps=warps,
        **options,
    )


def gated(x: torch.Tensor, weight: Weight, out: torch.Tensor) -> None:
    n, k = weight.values.shape[0] // 2, weight.values.shape[1]
    scaled, scales = weight.scales is not None, weight.scales if weight.scales is not None else x
    options = _options(chains(out.device))
    if len(x) > 1:
        block_n, block_k, warps, stages = _tile(ROWS_GATED, n, k, weight, _measured(x))
        _rows_gated_kernel[(triton.cdiv(n, block_n),)](
            x,
            weight.values,
            scales,
            out,
            k,
            n,
            len(x),
            SCALED=scaled,
            ROWS=max(16, triton.next_power_of_2(len(x))),
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
            **options,
        )
        return
    block_n, block_k, warps = _tile(GATED, n, k, weight)
    _gated_kernel[(triton.cdiv(n, block_n),)](
        x,
        weight.values,
        scales,
        out,
        k,
        n,
        SCALED=scaled,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN=k % block_k == 0,
        num_warps=warps,
        **options,
    )


def attend(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    half: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    state: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    scale: float,
) -> None:
    rows, heads, capacity, width = keys.shape
    queries = out.shape[-1] // width
    group = queries // heads
    splits = triton.cdiv(capacity, SPLIT)
    options = _options(chains(out.device))
    _attend_kernel[(heads, splits, rows)](
        qkv,
        cos,
        sin,
        keys,
        values,
        state,
        *scratch,
        scale,
        capacity,
        cos.shape[1],
        splits,
        HEADS=heads,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        D=width,
        HALF=half,
        SPLIT_=SPLIT,
        num_warps=4,
        **options,
    )
    _combine_kernel[(queries, rows)](
        *scratch, state, out, splits, D=width, SPLIT_=SPLIT, CHUNK=32, num_warps=4, **options
    )


def scratch(keys: torch.Tensor, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where `attend` keeps its splits; `keys` has the shape (layers, rows, heads, positions, width)."""
    splits, each = triton.cdiv(keys.shape[-2], SPLIT), keys.shape[1] * queries
    made: dict[str, Any] = {"device": keys.device, "dtype": torch.float32}
    return torch.zeros(each, splits, keys.shape[-1], **made), torch.zeros(each, splits, 2, **made)


def sample(
    logits: torch.Tensor,
    noise: torch.Tensor,
    ids: torch.Tensor,
    state: torch.Tensor,
    temperature: float,
    top_p: float,
) -> None:
    rows, book = logits.shape
    _sample_kernel[(rows,)](
        logits,
        noise,
        ids,
        state,
        noise.shape[-1],
        book,
        ids.shape[1],
        temperature,
        1.0 - top_p if top_p < 1.0 else -1.0,
        RING=noise.shape[0],
        BLOCK=triton.next_power_of_2(book),
        num_warps=16,
        **_options(chains(logits.device)),
    )


def modulated(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    texts: int,
    eps: float,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eight: bool = False,
) -> tuple[torch.Tensor, Any]:
    tokens, n = x.shape
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn) if eight else torch.empty_like(x)
    steps = torch.empty(tokens, 1, dtype=torch.float32, device=x.device) if eight else x
    hidden = torch.empty_like(x) if branch is not None else x
    _modulated_kernel[(tokens,)](
        x,
        branch if branch is not None else x,
        gate if gate is not None else shift,
        shift,
        scale,
        hidden,
        out,
        steps,
        texts,
        n,
        eps,
        GATED=branch is not None,
        EIGHT=eight,
        BLOCK=triton.next_power_of_2(n),
        num_warps=8 if n >= 4096 else 4,
    )
    return hidden, Weight(out, steps) if eight else out


def eighth(x: torch.Tensor, gelu: bool = False) -> Weight:
    rows, n = x.shape
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    steps = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(n)
    _eight_kernel[(rows,)](x, out, steps, n, GELU=gelu, BLOCK=block, num_warps=16 if block > 8192 else 8)
    return Weight(out, steps)


def product(x: Weight, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    assert x.scales is not None and weight.scales is not None
    found: torch.Tensor = torch._scaled_mm(
        x.values,
        weight.values.t(),
        x.scales,
        weight.scales[None],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return found


def queries_keys(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, texts: int, heads: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = qkv.shape[0], qkv.shape[1] // 3 // heads
    q = qkv.new_empty(tokens, heads, width)
    k = torch.empty_like(q)
    rows = min(32, triton.next_power_of_2(heads))
    _qk_kernel[(tokens, triton.cdiv(heads, rows), 2)](
        qkv, cos, sin, q, k, texts, heads, eps, D=width, HEADS=heads, ROWS=rows, num_warps=4
    )
    return q, k


def grown(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
