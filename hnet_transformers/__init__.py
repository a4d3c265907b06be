"""H-Nets for transformers (the extra `transformers`): config, model, byte tokenizer, and folders that load anywhere.

After `import hnet_transformers`, transformers' Auto classes know the model.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from hnet_transformers.configuration_hnet import PAD, HNetTransformersConfig
from hnet_transformers.modeling_hnet import HNetCache, HNetForCausalLM, Utf8LogitsProcessor
from hnet_transformers.tokenization_hnet import byte_tokenizer

AutoConfig.register("hnet", HNetTransformersConfig, exist_ok=True)
AutoModelForCausalLM.register(HNetTransformersConfig, HNetForCausalLM, exist_ok=True)

__all__ = ["PAD", "HNetCache", "HNetForCausalLM", "HNetTransformersConfig", "Utf8LogitsProcessor", "byte_tokenizer"]
