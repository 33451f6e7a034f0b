"""GLM (110M to 10B): configuration and model in the style of transformers."""

from gmask.models.glm.configuration import GLMConfig as GLMConfig
from gmask.models.glm.heads import GLMForMultipleChoice as GLMForMultipleChoice
from gmask.models.glm.heads import GLMForMultiTokenCloze as GLMForMultiTokenCloze
from gmask.models.glm.heads import GLMForSequenceClassification as GLMForSequenceClassification
from gmask.models.glm.heads import GLMForSingleTokenCloze as GLMForSingleTokenCloze
from gmask.models.glm.modeling import GLMForConditionalGeneration as GLMForConditionalGeneration
from gmask.models.glm.modeling import GLMModel as GLMModel
