"""The config of an H-Net as transformers stores it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hnet_trainable import BOS, EOS, ConfigError, HNetConfig, parse_layout  # which registers the letters of layouts

PAD = 0xFD  # it does not occur in UTF-8 either; not EOS, since padding is no label


class HNetTransformersConfig(PreTrainedConfig):
    """A config for transformers. `hnet` holds all keys of an HNetConfig, as `HNetConfig.to_dict` returns them.

    hnet: an HNetConfig, a mapping, a JSON file or the name of one in configs/. ratio_weight: the weight of the ratio
    losses in the loss, alpha of train.py. trained: what the model card says of the run that trained the weights.
    Raises ConfigError, a ValueError, where `hnet` is no config of an H-Net.
    """

    model_type = "hnet"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "ce", "ratio_losses", "boundaries"]

    def __init__(
        self,
        hnet: HNetConfig | Mapping[str, Any] | str | Path | None = None,
        ratio_weight: float = 0.03,
        trained: dict[str, Any] | None = None,
        bos_token_id: int = BOS,
        eos_token_id: int = EOS,
        pad_token_id: int = PAD,
        **kwargs: Any,
    ):
        if misplaced := [field.name for field in dataclasses.fields(HNetConfig) if field.name in kwargs]:
            raise ConfigError(f"{misplaced[0]}: a key of an H-Net's config; expected inside `hnet`")
        config = hnet if isinstance(hnet, HNetConfig | None) else HNetConfig.load(hnet)
        self.hnet = config.to_dict() if config else {}  # transformers builds one without arguments, to compare
        self.ratio_weight, self.trained = ratio_weight, trained
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**ids, **kwargs)
        for name, number in ids.items():
            setattr(self, name, number)

    @property
    def hnet_config(self) -> HNetConfig:
        """The checked HNetConfig. Raises ConfigError if there is none."""
        if not self.hnet:
            raise ConfigError("hnet: missing; expected the keys of an H-Net's config, such as arch_layout and d_model")
        return HNetConfig.load(self.hnet)

    @property
    def vocab_size(self) -> int:
        return self.hnet["vocab_size"] if self.hnet else 256

    @property
    def hidden_size(self) -> int:
        """The width of the outermost stage."""
        return self.hnet["d_model"][0] if self.hnet else 0

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks of all stages."""
        config = self.hnet_config
        layouts = [layout for s in range(config.num_stages + 1) for layout in config.layouts(s)]
        return sum(len(parse_layout(layout)) for layout in layouts)

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.hnet and self.hnet["tie_embeddings"])
