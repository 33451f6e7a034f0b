"""On which device does each part of a ChatGLM-6B run?"""

from gmask.errors import GmaskError
from gmask.models.chatglm.configuration import ChatGLMConfig

ENDS = ("transformer.word_embeddings", "transformer.final_layernorm", "lm_head")
"""Before and behind the layers; together on the first device, where the prompt goes and the logits are read."""


def spread_layers(config: ChatGLMConfig, devices: int) -> dict[str, int]:
    """A map of a model's parts to the devices 0, 1, ..., as even as can be; `ENDS` count as two layers.

    Source: ``auto_configure_device_map`` in utils.py of THUDM/ChatGLM-6B, whose shares may differ by two layers.

    Raises:
        GmaskError: more devices than layers.
    """
    layers = config.num_hidden_layers
    if not 1 <= devices <= layers:
        raise GmaskError(f"{layers} layers cannot be spread over {devices} devices: choose 1 to {layers}")
    places = dict.fromkeys(ENDS, 0)
    if config.pre_seq_len is not None:
        places["transformer.prefix_encoder"] = 0
    share = (layers + 2) / devices
    return places | {f"transformer.layers.{layer}": int((layer + 2) / share) for layer in range(layers)}
