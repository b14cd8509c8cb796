"""How GLM-Image runs: tokens from the autoregressive stage, then the DiT."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from PIL import Image

from runtime.engine.context import Context
from runtime.engine.running import FreshScheduler, Hooks, cpu_generator, stock_variant
from runtime.errors import Cancelled, StartupError
from runtime.families.glm_image import reference
from runtime.families.glm_image.decoder import MOST_ROWS
from runtime.families.glm_image.memory import LEAST
from runtime.families.glm_image.memory import place_weights as place_weights
from runtime.families.glm_image.memory import plan_memory as plan_memory
from runtime.families.glm_image.ops import batching_ops, hook, name_of, ops_of
from runtime.families.glm_image.request import MULTIPLE, source_size
from runtime.families.glm_image.stages import take
from runtime.families.glm_image.tokens import TokenStage, Wanted
from runtime.families.glm_image.transformer import Denoiser, attention_backend
from runtime.families.glm_image.weights import DENOISER_LINEARS, TOKEN_LINEARS, eight_bits
from runtime.types import PLAIN, Acceleration, GenerationRequest, Progress, SourceImage


def facts(pipeline: Any, folder: Path) -> dict[str, Any]:
    size = pipeline.processor.image_processor.size  # edges are written as areas: smart_resize takes their roots
    return {
        "video": False,
        # Sequential offload brings layers to the device by `forward`; sources' tokens come from other methods.
        "edits": not any(map(hook, pipeline.vision_language_encoder.model.vqmodel.modules())),
        "batches": batching_ops(pipeline.vision_language_encoder) is not None,
        "special_tokens": [*pipeline.processor.tokenizer.all_special_tokens, pipeline.processor.image_token],
        "source_shortest_edge": round(math.sqrt(size["shortest_edge"])),
        "source_longest_edge": round(math.sqrt(size["longest_edge"])),
    }


def warmup(facts: dict[str, Any]) -> GenerationRequest:
    return GenerationRequest(
        prompt="warm-up",
        width=MULTIPLE,
        height=MULTIPLE,
        num_inference_steps=1,
        seed=0,
        n=1,
        output_format="png",
        guidance_scale=1.5,
        max_sequence_length=64,
    )


@dataclass(frozen=True)
class Prior:
    """What the DiT takes from the token stage: a picture's ids, and those of its sources with their grids."""

    ids: torch.Tensor
    source_ids: list[torch.Tensor] | None
    source_grids: list[torch.Tensor] | None


@dataclass(frozen=True)
class Asked:
    """What a request wants of the token stage, where its picture's grid lies in the ids, its rows and columns, and what
    there is of its sources."""

    wanted: Wanted
    grid: slice
    shape: tuple[int, int]
    source_ids: list[torch.Tensor] | None
    source_grids: list[torch.Tensor] | None


class Runner:
    """One GLM-Image pipeline. The token stage keeps state on its model: one generation at a time.

    `fast` None takes the fast path where a GPU has it and nothing stands in its way; True takes it anywhere, on a CPU
    without kernels. `variant` says what came of it and of `acceleration`.
    """

    def __init__(self, pipeline: Any, acceleration: Acceleration = PLAIN, fast: bool | None = None) -> None:
        self._pipeline = pipeline
        self._hooks = Hooks(pipeline)
        self._scheduler = FreshScheduler(pipeline)
        self._facts = facts(pipeline, Path())
        encoder, transformer = pipeline.vision_language_encoder, pipeline.transformer
        ops, denoiser_ops = ops_of(encoder, fast), ops_of(transformer, fast)
        if fast is None and acceleration.rows > 1:
            ops = batching_ops(encoder)
        token_weights, eight = acceleration.token_weights, acceleration.denoiser_weights == "float8"
        _check_8_bit("TOKEN_WEIGHTS", token_weights, encoder, ops)
        _check_8_bit("DENOISER_WEIGHTS", acceleration.denoiser_weights, transformer, denoiser_ops)
        if ops is not None and acceleration.rows > MOST_ROWS:
            raise StartupError(f"MAX_BATCH_SIZE={acceleration.rows}: GLM-Image takes up to {MOST_ROWS}")
        book = transformer.config.prior_vq_quantizer_codebook_size
        if token_weights != "plain":
            eight_bits(encoder, TOKEN_LINEARS, token_weights, encoder.device)
        take(pipeline, "tokens")  # views are made of what is there
        self._tokens = TokenStage(encoder, book, ops, acceleration.rows)
        self._denoiser: Denoiser | None = None
        self.variant = f"tokens by {name_of(ops)}" + (f" from {token_weights}" if token_weights != "plain" else "")
        if ops is not None and acceleration.rows > 1:
            self.variant += f", {acceleration.rows} rows"
        if denoiser_ops is not None:
            backend = attention_backend(acceleration.attention, transformer.device, transformer.dtype)
            if eight:
                eight_bits(transformer, DENOISER_LINEARS, "float8", transformer.device)
            take(pipeline, "denoise")
            self._denoiser = Denoiser(transformer, denoiser_ops, backend)
            self.variant += f", DiT by {name_of(denoiser_ops)}" + (" in float8" if eight else "")
            self.variant += f", {backend} attention"
        else:
            stock = stock_variant(pipeline, replace(PLAIN, attention=acceleration.attention))
            self.variant = f"{self.variant}, DiT by {stock}" if ops else stock

    def run(self, request: GenerationRequest, seed: int, context: Context) -> Image.Image:
        """One picture; equal on the CPU to what the stock pipeline gives with ids outside the code book suppressed."""
        return self._picture(request, seed, self._prior_tokens([(request, seed)], context)[0], context)

    def run_batch(self, rows: list[tuple[GenerationRequest, int]], context: Context) -> Iterator[Image.Image | None]:
        """A picture for each request and seed, as it is there: tokens of all at once, then one picture after another.
        None for one that nobody waits for any more. Each row's context is its own; the tokens' progress is told to the
        first row of each request."""
        firsts = [own for i, own in enumerate(context.rows) if i == 0 or rows[i][0] is not rows[i - 1][0]]
        done: Progress | None = None

        def told(progress: Progress) -> None:
            nonlocal done
            done = progress
            for own in firsts:
                own.on_progress(progress)

        together = Context(context.device, context.should_stop, told)
        tokens: list[Prior] | None = None
        if self._tokens.together:
            tokens = self._prior_tokens(rows, together)
            context.timings.update(together.timings)
        for i, ((request, seed), own) in enumerate(zip(rows, context.rows, strict=True)):
            try:
                own.check()
                if tokens is not None and done is not None and own not in firsts:
                    own.on_progress(done)
                given = self._prior_tokens([(request, seed)], own)[0] if tokens is None else tokens[i]
                yield self._picture(request, seed, given, own)
            except Cancelled:
                yield None

    def _picture(self, request: GenerationRequest, seed: int, prior: Prior, context: Context) -> Image.Image:
        """What the DiT makes of the tokens."""
        pipeline = self._pipeline
        pipeline.scheduler = self._scheduler()
        images = [self._resized(image) for image in request.images] or None
        try:
            output = self._hooks.call(
                pipeline,
                request,
                context,
                prompt=request.prompt,
                image=images,
                height=request.height,
                width=request.width,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                max_sequence_length=request.max_sequence_length,
                generator=cpu_generator(seed),
                prior_token_ids=prior.ids,
                prior_token_image_ids=prior.source_ids,
                source_image_grid_thw=prior.source_grids,
            )
        finally:
            if self._denoiser is not None:
                self._denoiser.forget()
        picture: Image.Image = output.images[0]
        return picture

    def _resized(self, image: SourceImage) -> Image.Image:
        """The source at the one size that the token path and the VAE path both keep."""
        picture = Image.frombytes("RGB", (image.width, image.height), image.rgb)
        size = source_size(image.width, image.height, self._facts)
        return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)

    @torch.no_grad()
    def _prior_tokens(self, rows: list[tuple[GenerationRequest, int]], context: Context) -> list[Prior]:
        """Of each request and seed. Follows GlmImagePipeline.generate_prior_tokens, with a sampler that draws from the
        request's own generator, stays within the code book and can be stopped."""
        with context.stage("tokens"):
            take(self._pipeline, "tokens")
            try:
                asked = [self._asked(request, seed) for request, seed in rows]
                sampled = self._tokens.generate([one.wanted for one in asked], context)
            finally:
                self._tokens.forget()
        upsampled = self._pipeline._upsample_token_ids
        return [
            Prior(upsampled(ids[one.grid], *one.shape), one.source_ids, one.source_grids)
            for ids, one in zip(sampled, asked, strict=True)
        ]

    def _asked(self, request: GenerationRequest, seed: int) -> Asked:
        pipeline, images = self._pipeline, [self._resized(image) for image in request.images] or None
        encoder, device = pipeline.vision_language_encoder, pipeline._execution_device
        content = [{"type": "image", "image": image} for image in images or []]
        inputs = pipeline.processor.apply_chat_template(
            [[{"role": "user", "content": [*content, {"type": "text", "text": request.prompt}]}]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": False, "target_h": request.height, "target_w": request.width},
        ).to(device)
        grids = inputs["image_grid_thw"]
        new_tokens, offset, rows, columns = pipeline._compute_generation_params(
            image_grid_thw=grids, is_text_to_image=images is None
        )
        source_ids = source_grids = None
        if images is not None:
            sources = grids[: len(images)]
            if isinstance(hook(encoder), CpuOffload):  # it moves weights before `forward`, and these are other methods
                hook(encoder).pre_forward(encoder)
            features = encoder.get_image_features(inputs["pixel_values"], sources).pooler_output
            ids = encoder.get_image_tokens(torch.cat(features, dim=0), sources)
            upsampled = [
                pipeline._upsample_token_ids(part, int(h), int(w)).squeeze(0)
                for part, (_, h, w) in zip(
                    torch.split(ids, sources.prod(dim=-1).tolist()), sources.tolist(), strict=True
                )
            ]
            scale = torch.tensor([1, 2, 2], device=sources.device)
            source_ids, source_grids = [torch.cat(upsampled, dim=0)], [sources * scale]
        # Stock samples one token more, for an end that nothing reads.
        wanted = Wanted(inputs, new_tokens - 1, cpu_generator(seed))
        return Asked(wanted, slice(offset, offset + rows * columns), (rows, columns), source_ids, source_grids)


def _check_8_bit(setting: str, weights: str, model: Any, ops: Any) -> None:
    """8-bit numbers are for the fast path, and float8 for GPUs that have it. Raises StartupError."""
    if weights == "plain" or ops is reference:
        return
    asked = f"{setting}={weights}"
    if ops is None:
        raise StartupError(f"{asked}: needs GLM-Image's kernels, which run on a CUDA device without offload")
    if torch.cuda.get_device_capability(model.device) < LEAST[weights]:
        raise StartupError(f"{asked}: this GPU has no float8; TOKEN_WEIGHTS=int8 is what it can do")
    if model.dtype != torch.bfloat16:
        raise StartupError(f"{asked}: is for DTYPE=bfloat16, not {model.dtype}")
