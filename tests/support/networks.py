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
