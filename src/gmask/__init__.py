"""gmask: the first-generation GLM family, which fills in blanks, on today's PyTorch and transformers.

The public names are imported on first use, so that ``import gmask`` loads neither torch nor transformers. It also lets
transformers' Auto classes read published GLM folders.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmask.checkpoints.adapters import load_adapter as load_adapter
    from gmask.checkpoints.adapters import merge_adapter as merge_adapter
    from gmask.checkpoints.adapters import save_adapter as save_adapter
    from gmask.checkpoints.load import load as load
    from gmask.checkpoints.load import load_model_on_gpus as load_model_on_gpus
    from gmask.errors import GmaskError as GmaskError
    from gmask.generation.answers import Blank as Blank
    from gmask.generation.answers import Infilling as Infilling
    from gmask.generation.answers import Token as Token
    from gmask.generation.chat import Chat as Chat
    from gmask.generation.chat import Reply as Reply
    from gmask.generation.chat import reply_all as reply_all
    from gmask.generation.embed import embed as embed
    from gmask.generation.infill import Fragment as Fragment
    from gmask.generation.infill import infill as infill
    from gmask.generation.infill import stream_infill as stream_infill
    from gmask.generation.score import ScoredAnswer as ScoredAnswer
    from gmask.generation.score import Scoring as Scoring
    from gmask.generation.score import score as score
    from gmask.models.chatglm import ChatGLMConfig as ChatGLMConfig
    from gmask.models.chatglm import ChatGLMForConditionalGeneration as ChatGLMForConditionalGeneration
    from gmask.models.glm import GLMConfig as GLMConfig
    from gmask.models.glm import GLMForConditionalGeneration as GLMForConditionalGeneration
    from gmask.models.glm import GLMModel as GLMModel
    from gmask.models.glm_heads import GLMForMultipleChoice as GLMForMultipleChoice
    from gmask.models.glm_heads import GLMForMultiTokenCloze as GLMForMultiTokenCloze
    from gmask.models.glm_heads import GLMForSequenceClassification as GLMForSequenceClassification
    from gmask.models.glm_heads import GLMForSingleTokenCloze as GLMForSingleTokenCloze

__version__ = "0.1.0"

_HOMES = {
    "load_adapter": "gmask.checkpoints.adapters",
    "merge_adapter": "gmask.checkpoints.adapters",
    "save_adapter": "gmask.checkpoints.adapters",
    "GmaskError": "gmask.errors",
    "Blank": "gmask.generation.answers",
    "Infilling": "gmask.generation.answers",
    "Token": "gmask.generation.answers",
    "Chat": "gmask.generation.chat",
    "Reply": "gmask.generation.chat",
    "reply_all": "gmask.generation.chat",
    "embed": "gmask.generation.embed",
    "infill": "gmask.generation.infill",
    "ScoredAnswer": "gmask.generation.score",
    "Scoring": "gmask.generation.score",
    "score": "gmask.generation.score",
    "Fragment": "gmask.generation.infill",
    "stream_infill": "gmask.generation.infill",
    "load": "gmask.checkpoints.load",
    "load_model_on_gpus": "gmask.checkpoints.load",
    "ChatGLMConfig": "gmask.models.chatglm",
    "ChatGLMForConditionalGeneration": "gmask.models.chatglm",
    "GLMConfig": "gmask.models.glm",
    "GLMForConditionalGeneration": "gmask.models.glm",
    "GLMForMultipleChoice": "gmask.models.glm_heads",
    "GLMForMultiTokenCloze": "gmask.models.glm_heads",
    "GLMForSequenceClassification": "gmask.models.glm_heads",
    "GLMForSingleTokenCloze": "gmask.models.glm_heads",
    "GLMModel": "gmask.models.glm",
}

__all__ = [
    "Blank",
    "Chat",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "Fragment",
    "GLMConfig",
    "GLMForConditionalGeneration",
    "GLMForMultiTokenCloze",
    "GLMForMultipleChoice",
    "GLMForSequenceClassification",
    "GLMForSingleTokenCloze",
    "GLMModel",
    "GmaskError",
    "Infilling",
    "Reply",
    "ScoredAnswer",
    "Scoring",
    "Token",
    "__version__",
    "embed",
    "infill",
    "load",
    "load_adapter",
    "load_model_on_gpus",
    "merge_adapter",
    "reply_all",
    "save_adapter",
    "score",
    "stream_infill",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gmask' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    """Lets transformers' Auto classes know the GLMs, now or when they are first imported."""
    from gmask.registration import register

    register()


_register()
