"""Tiny, complete, random-weight pipelines of every model family, written to a folder in seconds.

    python -m runtime.tiny DIR [--family NAME ...]

Each DIR/NAME is what the real checkpoint is: the same classes, files, config names and structural rules
(downscales, patch sizes, two experts, ids beyond the code book), with few channels and seeded random weights.
Tests run on them without a GPU, a newcomer serves them on a laptop; their pictures are coloured noise, yet
every prompt, seed and source picture gives its own. The weights are the same bytes on every run.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import diffusers as diffusers_library
import tokenizers
import torch
import transformers as transformers_library
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from runtime.types import DEFAULTS_FILE

# Classes are looked up where they are used, so that importing this module stays quick and silent. Both
# libraries show a type checker untyped placeholders, hence Any; the aliases say what is meant.
diffusers: Any = diffusers_library
transformers: Any = transformers_library
Pipeline: TypeAlias = Any
Model: TypeAlias = Any
Config: TypeAlias = Any
Tokenizer: TypeAlias = Any
Processor: TypeAlias = Any

SEED = 20
CLIP_WIDTH = 32
T5_WIDTH = 64  # SD3 pads its two CLIP embeddings side by side to the width of T5's
LATENT_CHANNELS = 16  # of every VAE here but Stable Diffusion 1.5's, XL's and Wan TI2V's
SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NO_QUANT_CONV = {"use_quant_conv": False, "use_post_quant_conv": False}

# GLM-Image's vocabulary: code-book ids first, then begin and end of image and more ids that the head can say
# but the DiT has no row for (the real one: 16,384 rows, 16,512 head outputs), then the text.
GLM_CODE_BOOK = 256
GLM_IMAGE_START = GLM_CODE_BOOK
GLM_IMAGE_END = GLM_CODE_BOOK + 1
GLM_VISION_VOCAB = GLM_CODE_BOOK + 32


def _unit_gain(module: Model) -> None:
    """Layers start with a gain of 1/sqrt(3): a few of them would hide the prompt and the source picture."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.mul_(3**0.5)


def _denoiser(model_class: Callable[..., Model], **config: Any) -> Model:
    model = model_class(**config)
    _unit_gain(model)
    return model


def _transformer(model_class: Callable[..., Model], **config: Any) -> Model:
    return _denoiser(model_class, num_layers=2, num_attention_heads=2, attention_head_dim=16, **config)


# --- text ---


def _byte_symbols() -> list[str]:
    """One printable symbol for each byte: text in any language has ids, without a learned vocabulary."""
    return sorted(ByteLevel.alphabet())


def _byte_bpe(symbols: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE without merges: each byte of the text is a token."""
    tokenizer = tokenizers.Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _clip_tokenizer(pad_token: str = "<|endoftext|>") -> Tokenizer:
    symbols = _byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token=pad_token)


def _clip_config(tokenizer: Tokenizer, hidden_act: str = "quick_gelu") -> Config:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _two_clips(first_class: Callable[..., Model]) -> dict[str, Any]:
    """The pair that XL and SD3 share; the second pads with "!", as the real one."""
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer(pad_token="!")
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": first_class(_clip_config(tokenizer)),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(_clip_config(tokenizer_2, "gelu")),
    }


def t5_tokenizer() -> Tokenizer:
    backend = _byte_bpe(["<pad>", "</s>", "<unk>", *_byte_symbols()])
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _t5_sizes() -> dict[str, Any]:
    """What T5, ByT5 and UMT5 share."""
    return {
        "vocab_size": 384,  # ByT5's own, and enough for the byte tokenizer
        "d_model": T5_WIDTH,
        "d_kv": 16,
        "d_ff": T5_WIDTH,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def _t5_encoder() -> Model:
    return transformers.T5EncoderModel(transformers.T5Config(**_t5_sizes()))


# --- pictures ---


def _image_vae(latent_channels: int = LATENT_CHANNELS, **config: Any) -> Model:
    """Four blocks, as every real one: 8x downscale."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=latent_channels,
        sample_size=64,
        **config,
    )


def _unit_latents(channels: int) -> dict[str, Any]:
    return {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}


def _unet(**config: Any) -> Model:
    return _denoiser(
        diffusers.UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **config,
    )


def _sd15() -> Pipeline:
    tokenizer = _clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.CLIPTextModel(_clip_config(tokenizer)),
        unet=_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=CLIP_WIDTH,
            attention_head_dim=2,
        ),
        vae=_image_vae(4, scaling_factor=0.18215),
        scheduler=diffusers.PNDMScheduler(**SD_NOISE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Pipeline:
    time_ids, id_width = 6, 8  # original size, crop and target size, each embedded beside the pooled prompt
    return diffusers.StableDiffusionXLPipeline(
        **_two_clips(transformers.CLIPTextModel),
        unet=_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * CLIP_WIDTH,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=id_width,
            projection_class_embeddings_input_dim=CLIP_WIDTH + time_ids * id_width,
        ),
        vae=_image_vae(4, scaling_factor=0.13025),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
    )


def _sd3() -> Pipeline:
    return diffusers.StableDiffusion3Pipeline(
        **_two_clips(transformers.CLIPTextModelWithProjection),
        tokenizer_3=t5_tokenizer(),
        text_encoder_3=_t5_encoder(),
        transformer=_transformer(
            diffusers.SD3Transformer2DModel,
            sample_size=8,
            caption_projection_dim=32,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=32,
        ),
        vae=_image_vae(scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT_CONV),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> Pipeline:
    tokenizer = _clip_tokenizer()
    return diffusers.FluxPipeline(
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer(),
        text_encoder=transformers.CLIPTextModel(_clip_config(tokenizer)),
        text_encoder_2=_t5_encoder(),
        transformer=_transformer(
            diffusers.FluxTransformer2DModel,
            in_channels=4 * LATENT_CHANNELS,  # 2x2 latents are one token
            num_single_layers=1,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        ),
        vae=_image_vae(scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT_CONV),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


# --- GLM-Image ---


def glm_processor(
    book: int = GLM_CODE_BOOK, vision_vocab: int = GLM_VISION_VOCAB, edges: tuple[int, int] = (64, 256)
) -> Processor:
    """Reads the prompt (and source pictures, resized between `edges`) for the token stage."""
    codes = [f"<|dit_token_{i}|>" for i in range(vision_vocab)]
    image, grid_start, grid_end, pad = specials = ["<|image|>", "<sop>", "<eop>", "<|endoftext|>"]
    start, end = codes[book], codes[book + 1]
    backend = _byte_bpe([*codes, *specials, *_byte_symbols()])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        extra_special_tokens={"image_token": image, "grid_bos_token": grid_start, "grid_eos_token": grid_end},
        padding_side="left",
        model_max_length=4096,
    )
    return transformers.GlmImageProcessor(
        # A source outside these bounds is resized for the tokens but not for the VAE, as with the real ones.
        transformers.GlmImageImageProcessorPil(
            size={"shortest_edge": edges[0] ** 2, "longest_edge": edges[1] ** 2},
            patch_size=16,
            merge_size=1,
            temporal_patch_size=1,
        ),
        tokenizer,
        chat_template=(
            "{% for message in messages %}{% for part in message.content %}"
            "{% if part.type == 'image' %}" + start + image + end + "{% else %}{{ part.text }}{% endif %}"
            "{% endfor %}{% endfor %}"
        ),
    )


def _glm_token_model(tokenizer: Tokenizer) -> Model:
    """The autoregressive stage: vision tower, code book and language model."""
    model = transformers.GlmImageForConditionalGeneration(
        transformers.GlmImageConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "vision_vocab_size": GLM_VISION_VOCAB,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.08,  # at 0.02 the prompt would hardly sway the sampled tokens
                "max_position_embeddings": 4096,
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": GLM_IMAGE_END,
                # Half of a head's 32 is rotated: 8 frequencies for time, height, width; really [8, 12, 12].
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 3, 3],
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 64,
                "image_size": 256,
                "patch_size": 16,
            },
            vq_config={"embed_dim": 16, "num_embeddings": GLM_CODE_BOOK, "latent_channels": 32},
            image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
            image_start_token_id=GLM_IMAGE_START,
            image_end_token_id=GLM_IMAGE_END,
        )
    )
    with torch.no_grad():
        # A logit of zero is always within top_p: the end may be sampled before the grid is full.
        model.lm_head.weight[GLM_IMAGE_END].zero_()
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.75,
        top_k=GLM_VISION_VOCAB,  # left out, transformers would take 50
        eos_token_id=GLM_IMAGE_END,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _glm_image() -> Pipeline:
    processor = glm_processor()
    return diffusers.GlmImagePipeline(
        tokenizer=transformers.ByT5Tokenizer(model_max_length=2048),
        processor=processor,
        text_encoder=_t5_encoder(),
        vision_language_encoder=_glm_token_model(processor.tokenizer),
        vae=_image_vae(**_unit_latents(LATENT_CHANNELS), **NO_QUANT_CONV),
        transformer=_transformer(
            diffusers.GlmImageTransformer2DModel,
            text_embed_dim=T5_WIDTH,
            time_embed_dim=32,
            condition_dim=16,
            prior_vq_quantizer_codebook_size=GLM_CODE_BOOK,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75
        ),
    )


# --- Wan 2.2 ---


def _wan_expert(in_channels: int, out_channels: int) -> Model:
    return _transformer(
        diffusers.WanTransformer3DModel,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=T5_WIDTH,
        ffn_dim=64,
        freq_dim=32,
    )


def _wan_vae(z_dim: int, **config: Any) -> Model:
    vae = diffusers.AutoencoderKLWan(z_dim=z_dim, base_dim=4, num_res_blocks=1, **config)
    _unit_gain(vae.encoder)
    _unit_gain(vae.quant_conv)
    return vae


def _wan_parts(vae: Model, flow_shift: float) -> dict[str, Any]:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**_t5_sizes())),
        "vae": vae,
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
    }


def _wan_t2v_a14b() -> Pipeline:
    return diffusers.WanPipeline(
        **_wan_parts(_wan_vae(LATENT_CHANNELS), flow_shift=12.0),
        transformer=_wan_expert(LATENT_CHANNELS, LATENT_CHANNELS),
        transformer_2=_wan_expert(LATENT_CHANNELS, LATENT_CHANNELS),
        boundary_ratio=0.875,
    )


def _wan_i2v_a14b() -> Pipeline:
    in_channels = 2 * LATENT_CHANNELS + 4  # noise, source picture, which of a latent's four frames are given
    return diffusers.WanImageToVideoPipeline(
        **_wan_parts(_wan_vae(LATENT_CHANNELS), flow_shift=5.0),
        transformer=_wan_expert(in_channels, LATENT_CHANNELS),
        transformer_2=_wan_expert(in_channels, LATENT_CHANNELS),
        boundary_ratio=0.9,
    )


def _wan_ti2v_5b() -> Pipeline:
    """One checkpoint for both jobs: image to video runs WanImageToVideoPipeline over the same parts."""
    channels = 48
    vae = _wan_vae(
        channels,
        **_unit_latents(channels),
        is_residual=True,
        patch_size=2,
        in_channels=12,  # a 2x2 patch of RGB
        out_channels=12,
        scale_factor_spatial=16,
    )
    return diffusers.WanPipeline(
        **_wan_parts(vae, flow_shift=5.0), transformer=_wan_expert(channels, channels), expand_timesteps=True
    )


FAMILIES: dict[str, Callable[[], Pipeline]] = {
    "glm-image": _glm_image,
    "wan-t2v-a14b": _wan_t2v_a14b,
    "wan-i2v-a14b": _wan_i2v_a14b,
    "wan-ti2v-5b": _wan_ti2v_5b,
    "sd15": _sd15,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
}

# What a request that names no size gets: the real checkpoints' sizes would take a laptop hours.
_PICTURE = {"width": 64, "height": 64, "num_inference_steps": 8}
_VIDEO = {"width": 96, "height": 64, "num_frames": 17, "num_inference_steps": 8}
DEFAULTS: dict[str, dict[str, int]] = {family: _VIDEO if family.startswith("wan-") else _PICTURE for family in FAMILIES}


# --- writing ---


@contextmanager
def _own_seed() -> Iterator[None]:
    """Weights that depend on nothing outside, and a caller whose own random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would reseed every GPU too
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice from the libraries: neither means anything for a model of this size."""
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


def is_written(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def write(directory: Path, family: str) -> Path:
    """Write one family and return its folder, directory/family; a complete one is left as it is."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    target = directory / family
    if is_written(target):
        return target
    directory.mkdir(parents=True, exist_ok=True)
    # Renamed into place when whole: neither a killed run nor a second writer leaves half a model.
    with tempfile.TemporaryDirectory(prefix=f".{family}-", dir=directory) as scratch:
        unfinished = Path(scratch) / family
        with _quiet(), _own_seed():
            FAMILIES[family]().save_pretrained(unfinished, safe_serialization=True)
        (unfinished / DEFAULTS_FILE).write_text(json.dumps(DEFAULTS[family], indent=2) + "\n")
        try:
            unfinished.replace(target)
        except OSError as error:
            if not is_written(target):
                raise FileExistsError(f"{target} is in the way: it has no model_index.json") from error
    return target


def write_all(directory: Path, families: Iterable[str] = tuple(FAMILIES)) -> list[Path]:
    return [write(directory, family) for family in families]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime.tiny", description="Write tiny test models.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the model folders go")
    parser.add_argument(
        "--family",
        action="append",
        choices=list(FAMILIES),
        metavar="NAME",
        help=f"write this one only; may be repeated. Known: {', '.join(FAMILIES)}",
    )
    options = parser.parse_args(arguments)
    for family in options.family or FAMILIES:
        note = " (already there)" if is_written(options.directory / family) else ""
        try:
            print(f"{write(options.directory, family)}{note}", flush=True)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
