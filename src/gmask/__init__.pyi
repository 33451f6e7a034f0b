"""The public names of gmask, and where each is defined: for type checkers, and for `__init__.py`, which reads this."""

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
from gmask.generation.perplexity import Perplexity as Perplexity
from gmask.generation.perplexity import perplexity as perplexity
from gmask.generation.score import ScoredAnswer as ScoredAnswer
from gmask.generation.score import Scoring as Scoring
from gmask.generation.score import score as score
from gmask.models.chatglm import ChatGLMConfig as ChatGLMConfig
from gmask.models.chatglm import ChatGLMForConditionalGeneration as ChatGLMForConditionalGeneration
from gmask.models.chatglm import ChatGLMForReward as ChatGLMForReward
from gmask.models.glm import GLMConfig as GLMConfig
from gmask.models.glm import GLMForConditionalGeneration as GLMForConditionalGeneration
from gmask.models.glm import GLMModel as GLMModel
from gmask.models.glm_heads import GLMForMultipleChoice as GLMForMultipleChoice
from gmask.models.glm_heads import GLMForMultiTokenCloze as GLMForMultiTokenCloze
from gmask.models.glm_heads import GLMForReward as GLMForReward
from gmask.models.glm_heads import GLMForSequenceClassification as GLMForSequenceClassification
from gmask.models.glm_heads import GLMForSingleTokenCloze as GLMForSingleTokenCloze

__version__: str
__all__: list[str]
