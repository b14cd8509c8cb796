"""How GLM-Image runs: tokens from the autoregressive stage, then the DiT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from PIL import Image

from runtime.engine.context import Context
from runtime.engine.running import FreshScheduler, Hooks, cpu_generator
from runtime.families.glm_image.request import MULTIPLE, source_size
from runtime.types import GenerationRequest, SourceImage

TOKENS_PER_CHECK = 16


def facts(pipeline: Any, folder: Path) -> dict[str, Any]:
    size = pipeline.processor.image_processor.size  # edges are written as areas: smart_resize takes their roots
    return {
        "video": False,
        # Sequential offload brings layers to the device by `forward`; sources' tokens come from other methods.
        "edits": not any(map(_hook, pipeline.vision_language_encoder.model.vqmodel.modules())),
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


class Runner:
    """One GLM-Image pipeline. The token stage keeps state on its model: one generation at a time."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._hooks = Hooks(pipeline)
        self._scheduler = FreshScheduler(pipeline)
        self._facts = facts(pipeline, Path())
        encoder = pipeline.vision_language_encoder
        book = pipeline.transformer.config.prior_vq_quantizer_codebook_size
        # The head can say more ids than the DiT's embedding has rows; the end token would shorten the picture.
        self._outside_book = list(range(book, encoder.config.text_config.vision_vocab_size))

    def run(self, request: GenerationRequest, seed: int, context: Context) -> Image.Image:
        """One picture; equal on the CPU to what the stock pipeline gives with ids outside the code book suppressed."""
        pipeline = self._pipeline
        pipeline.scheduler = self._scheduler()
        images = [self._resized(image) for image in request.images] or None
        try:
            with context.stage("tokens"):
                tokens = self._prior_tokens(request, images, seed, context)
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
                **tokens,
            )
        finally:
            self._forget()
        picture: Image.Image = output.images[0]
        return picture

    def _resized(self, image: SourceImage) -> Image.Image:
        """The source at the one size that the token path and the VAE path both keep."""
        picture = Image.frombytes("RGB", (image.width, image.height), image.rgb)
        size = source_size(image.width, image.height, self._facts)
        return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)

    @torch.no_grad()
    def _prior_tokens(
        self, request: GenerationRequest, images: list[Image.Image] | None, seed: int, context: Context
    ) -> dict[str, Any]:
        """The DiT's prior arguments. Follows GlmImagePipeline.generate_prior_tokens for one prompt, with a sampler
        that draws from the request's own generator, stays within the code book and can be stopped."""
        pipeline = self._pipeline
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
        arguments: dict[str, Any] = {}
        if images is not None:
            sources = grids[: len(images)]
            if isinstance(_hook(encoder), CpuOffload):  # it moves weights before `forward`, and these are other methods
                _hook(encoder).pre_forward(encoder)
            features = encoder.get_image_features(inputs["pixel_values"], sources).pooler_output
            ids = encoder.get_image_tokens(torch.cat(features, dim=0), sources)
            upsampled = [
                pipeline._upsample_token_ids(part, int(h), int(w)).squeeze(0)
                for part, (_, h, w) in zip(
                    torch.split(ids, sources.prod(dim=-1).tolist()), sources.tolist(), strict=True
                )
            ]
            scale = torch.tensor([1, 2, 2], device=sources.device)
            arguments = {
                "prior_token_image_ids": [torch.cat(upsampled, dim=0)],
                "source_image_grid_thw": [sources * scale],
            }
        count = new_tokens - 1  # stock samples one token more, for an end that nothing reads
        sampled = encoder.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=True,
            suppress_tokens=self._outside_book or None,
            custom_generate=_sampler(count, cpu_generator(seed), context),
        )
        grid = sampled[0, offset : offset + rows * columns]
        return {"prior_token_ids": pipeline._upsample_token_ids(grid, rows, columns), **arguments}

    def _forget(self) -> None:
        """What the token stage keeps on its model between forwards must not reach the next request."""
        model = self._pipeline.vision_language_encoder.model
        model.rope_deltas = model._cached_decode_position_ids = model._prefill_len = None


def _hook(module: Any) -> Any:
    return getattr(module, "_hf_hook", None)


def _sampler(count: int, generator: torch.Generator, context: Context) -> Any:
    """A decoding method for transformers' `generate`: `count` ids of shape (1, count), drawn as torch.multinomial
    does on the CPU: argmax of probability over exponential noise, which here comes from `generator`."""

    def sample(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        start = input_ids.shape[1]
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        for step in range(1, count + 1):
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
            probabilities = logits_processor(input_ids, logits).softmax(dim=-1)
            noise = torch.empty(probabilities.shape).exponential_(1, generator=generator)
            drawn = (probabilities / noise.to(probabilities.device)).argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, drawn], dim=-1)
            if step % TOKENS_PER_CHECK == 0 or step == count:
                context.advance("tokens", step, count)
            if step < count:
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                outputs = model(**inputs, return_dict=True)
        return input_ids[:, start:]

    return sample
