"""A model's two ends, where memory is short: embeddings on the host, the head in NF4.

Both are asked for in `model`, and both are refused where they would do nothing: a table that
embeddings and head share is needed on the GPU in 16 bits.
"""

from torch import nn
from transformers import PreTrainedModel

from qlora_kit.core.errors import ConfigError
from qlora_kit.nn.host_embedding import keep_embeddings_on_host
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.train.config import ModelConfig


def settle_ends(model: PreTrainedModel, config: ModelConfig) -> None:
    """Check that the head is what was asked for, and move the embeddings.

    Args:
        model: loaded, and what is not trained frozen. Modified.
        config: of the base.

    Raises:
        ConfigError: the model's head or embeddings cannot be what was asked for.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
        >>> settle_ends(model.requires_grad_(False), ModelConfig(path="m", embeddings_on_host=True))
        >>> type(model.get_input_embeddings()).__name__
        'HostEmbedding'
    """
    head = model.get_output_embeddings()
    if config.quantize_head and not isinstance(head, NF4Linear):
        raise ConfigError(
            f"the head is not in NF4: {_why_not(model, config, head)}. Set model.quantize_head to "
            "false."
        )
    if config.embeddings_on_host:
        keep_embeddings_on_host(model)


def _why_not(model: PreTrainedModel, config: ModelConfig, head: object) -> str:
    if config.bits != 4:
        return "model.bits is 16"
    if not isinstance(head, nn.Module):
        return f"{type(model).__name__} has none"
    if model.get_input_embeddings().weight is head.weight:
        return "its weight is also that of the embeddings, which have to stay in 16 bits"
    return "the checkpoint is in 4 bits already and has it in 16, or quant.skip names it"
