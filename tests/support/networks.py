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


def tiny_stable_diffusion(vae: Any, scheduler: Any) -> Any:
    """A StableDiffusionPipeline around `vae` that knows the words "a cat"."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    words = ["<pad>", "<unk>", "</s>", "a", "cat"]
    return StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        word_tokenizer(words, pad_token="<pad>", eos_token="</s>", model_max_length=8),
        UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
