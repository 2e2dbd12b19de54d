"""Networks of other libraries with random weights, as small as they can be built."""

from collections.abc import Sequence
from typing import Any

import torch


def tiny_autoencoder(widths: Sequence[int], **changes: Any) -> Any:
    """An AutoencoderKL of 4 channels with a level for each of `widths`; the same weights every time."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=4,
        **changes,
    )


def word_tokenizer(words: Sequence[str], **special: Any) -> Any:
    """A tokenizer that numbers `words` in their order."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def tiny_stable_diffusion(vae: Any, scheduler: Any, **unet: Any) -> Any:
    """A StableDiffusionPipeline around `vae` that knows the words "a cat"; `unet` goes to its network."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        _clip_tokenizer(),
        UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
            sample_size=16,
            **unet,
        ),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def tiny_stable_diffusion_xl(vae: Any, scheduler: Any) -> Any:
    """A StableDiffusionXLPipeline around `vae` that knows the words "a cat"."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = _clip_tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        vae, _clip(), _clip(projected=True), tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )


def tiny_stable_diffusion_3(vae: Any) -> Any:
    """A StableDiffusion3Pipeline around `vae`, whose transformer and matching of flows are nobody's U-Net."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(
        transformer, scheduler, vae, _clip(projected=True), clip, _clip(projected=True), clip, _t5(32), t5
    )


def tiny_flux(vae: Any) -> Any:
    """A FluxPipeline around `vae`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler, vae, _clip(), _clip_tokenizer(), _t5(32), _t5_tokenizer(), transformer)


def _clip(projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
    )
    return CLIPTextModelWithProjection(text) if projected else CLIPTextModel(text)


def _clip_tokenizer() -> Any:
    words = ["<pad>", "<unk>", "</s>", "a", "cat"]
    return word_tokenizer(words, pad_token="<pad>", eos_token="</s>", model_max_length=8)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _t5_tokenizer() -> Any:
    return word_tokenizer(["<pad>", "</s>", "<unk>", "a", "cat"], pad_token="<pad>", eos_token="</s>")
