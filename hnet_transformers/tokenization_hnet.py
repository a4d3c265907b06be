"""The byte tokenizer: a token is a byte of UTF-8, and its number is the byte's value."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hnet_simple import TRAINED_LENGTH
from hnet_trainable import BOS, EOS
from hnet_transformers.configuration_hnet import PAD

SPECIAL = {BOS: "<|bos|>", EOS: "<|eos|>", PAD: "<|pad|>"}


def byte_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with 256 tokens, the bytes. A text begins with BOS (254); EOS (255) and padding (253) are special.

    Padding is on the left. `<|bos|>` and so on in a text are read as text (`split_special_tokens`). What it saves loads
    without this code. kwargs: options of PreTrainedTokenizerFast.
    """
    characters = _characters()
    vocabulary = {SPECIAL.get(byte, characters[byte]): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = SPECIAL[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)]
    )
    options = {
        "bos_token": bos,
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "padding_side": "left",
        "model_max_length": TRAINED_LENGTH,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**options, **kwargs})


def _characters() -> list[str]:
    """The character by which ByteLevel stands for each byte: itself where it is printable, else one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
