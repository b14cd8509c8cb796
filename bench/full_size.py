"""Complete pipelines of the real checkpoints' sizes with random weights in bfloat16, written to a folder.

    python -m bench.full_size DIR --family glm-image | wan-ti2v-5b [--meta]

What they take of time and memory is true, what they draw is noise. Weights are made on the GPU where there is one
(on a CPU it takes minutes) and lie in safetensors of less than 5 GB. `--meta` writes nothing and prints
how many parameters each part has.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers as diffusers_library
import torch
import transformers as transformers_library

from runtime.tiny import glm_processor, t5_tokenizer

diffusers: Any = diffusers_library
transformers: Any = transformers_library

BOOK, VISION_VOCAB = 16384, 16512
SHARD = "4800MB"


def glm_image() -> Any:
    processor = glm_processor(BOOK, VISION_VOCAB, (512, 2048))
    tokenizer = processor.tokenizer
    return diffusers.GlmImagePipeline(
        tokenizer=transformers.ByT5Tokenizer(model_max_length=2048),
        processor=processor,
        text_encoder=transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=384,
                d_model=1472,
                d_kv=64,
                d_ff=3584,
                num_layers=12,
                num_heads=6,
                feed_forward_proj="gated-gelu",
            )
        ),
        vision_language_encoder=_token_model(tokenizer),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(128, 512, 1024, 1024),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=3,
            latent_channels=16,
            sample_size=1024,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
        ),
        transformer=diffusers.GlmImageTransformer2DModel(
            num_layers=30, num_attention_heads=32, attention_head_dim=128, prior_vq_quantizer_codebook_size=BOOK
        ),
        scheduler=_scheduler(
            "FlowMatchEulerDiscreteScheduler",
            use_dynamic_shifting=True,
            time_shift_type="linear",
            base_shift=0.25,
            max_shift=0.75,
        ),
    )


def _token_model(tokenizer: Any) -> Any:
    model = transformers.GlmImageForConditionalGeneration(
        transformers.GlmImageConfig(
            text_config={
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": BOOK + 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [8, 12, 12],
                },
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
            image_start_token_id=BOOK,
            image_end_token_id=BOOK + 1,
        )
    )
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.75,
        top_k=VISION_VOCAB,
        eos_token_id=BOOK + 1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def wan_ti2v_5b() -> Any:
    channels = 48
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=256384,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        ),
        transformer=diffusers.WanTransformer3DModel(
            num_layers=30,
            num_attention_heads=24,
            attention_head_dim=128,
            in_channels=channels,
            out_channels=channels,
            ffn_dim=14336,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=channels,
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ),
        scheduler=_scheduler(
            "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        expand_timesteps=True,
    )


def _scheduler(name: str, **config: Any) -> Any:
    with torch.device("cpu"):  # its tables are read by the host
        return getattr(diffusers, name)(**config)


FAMILIES: dict[str, Callable[[], Any]] = {"glm-image": glm_image, "wan-ti2v-5b": wan_ti2v_5b}


def build(family: str, device: str) -> Any:
    """The pipeline with bfloat16 weights made on `device`; "meta" makes none."""
    with _made_on(device):
        return FAMILIES[family]()


@contextmanager
def _made_on(device: str) -> Iterator[None]:
    torch.manual_seed(20)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def parameters(pipeline: Any) -> dict[str, int]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.full_size", description="Write full-size random models.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="the model folder itself")
    parser.add_argument("--family", choices=list(FAMILIES), required=True)
    parser.add_argument("--meta", action="store_true", help="write nothing, count parameters")
    options = parser.parse_args()
    begun = time.perf_counter()
    device = "meta" if options.meta else "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = build(options.family, device)
    for name, count in parameters(pipeline).items():
        print(f"{name}: {count / 1e9:.3f} B parameters")
    if options.meta:
        return
    print(f"made on {device} in {time.perf_counter() - begun:.1f} s", flush=True)
    pipeline.save_pretrained(options.directory, safe_serialization=True, max_shard_size=SHARD)
    size = sum(path.stat().st_size for path in options.directory.rglob("*.safetensors"))
    print(f"{options.directory}: {size / 2**30:.1f} GiB, {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
