"""ChatGLM-6B, read top to bottom: configuration, positions, activation, inputs, modeling."""

from gmask.models.chatglm.configuration import ChatGLMConfig as ChatGLMConfig
from gmask.models.chatglm.modeling import ChatGLMForConditionalGeneration as ChatGLMForConditionalGeneration
from gmask.models.chatglm.modeling import ChatGLMModel as ChatGLMModel
