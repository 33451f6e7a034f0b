"""Does a captured graph (torch.export, torch.jit.trace) compute what the model computes, for other inputs, too?"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import GMASK, MASK, PAD, SOP
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration

# transformers asks itself whether a model's deprecated attribute is there, for every attribute of a captured module.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
SHAPE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
IDS = dict(pad_token_id=PAD, sop_token_id=SOP, mask_token_id=MASK, gmask_token_id=GMASK)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, layout: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "layout": layout}
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


@pytest.fixture(scope="module", params=["glm", "chatglm"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module
    if request.param == "glm":
        made = GLMForConditionalGeneration(GLMConfig(**SHAPE, **IDS, initializer_range=0.3))
    else:
        others = {name: value for name, value in IDS.items() if name != "sop_token_id"}
        config = ChatGLMConfig(**SHAPE, **others, intermediate_size=64, bos_token_id=SOP, eos_token_id=1)
        made = ChatGLMForConditionalGeneration(config)
    return Logits(made.eval().requires_grad_(False))


def prompts(*lengths: int) -> dict[str, Tensor]:
    """Prompts padded on the left: words, a blank, words, ``<sop>``."""
    rows = [[20 + n % 30 for n in range(length - 3)] + [GMASK, 21, SOP] for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


DYNAMIC = {0: torch.export.Dim("rows", min=1, max=16), 1: torch.export.Dim("length", min=3, max=64)}


def test_a_program_exported_from_ids_takes_other_lengths_and_padding(model: nn.Module) -> None:
    program = torch.export.export(
        model, (), kwargs=prompts(6, 9, 9), dynamic_shapes={"input_ids": DYNAMIC, "attention_mask": DYNAMIC}
    )
    for inputs in (prompts(6, 9, 9), prompts(12, 5), prompts(7, 7, 7, 4)):
        found, expected = program.module()(**inputs), model(**inputs)
        assert_equal_at_tokens(found, expected, inputs["attention_mask"])


def test_a_program_exported_with_a_layout_needs_no_special_ids(model: nn.Module) -> None:
    def with_layout(*lengths: int) -> dict[str, Any]:
        inputs = prompts(*lengths)
        return {**inputs, "layout": model.model.read_prompt_layout(inputs["input_ids"], inputs["attention_mask"])}

    shapes = {"input_ids": DYNAMIC, "attention_mask": DYNAMIC, "layout": {0: DYNAMIC[0], 2: DYNAMIC[1]}}
    program = torch.export.export(model, (), kwargs=with_layout(6, 9), dynamic_shapes=shapes)
    inputs = with_layout(5, 11, 4)
    assert_equal_at_tokens(program.module()(**inputs), model(**inputs), inputs["attention_mask"])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_graph_keeps_the_mask_that_its_own_input_did_not_need(model: nn.Module) -> None:
    traced = torch.jit.trace(model, example_kwarg_inputs=prompts(9, 9))  # no padding: nothing there to be hidden
    inputs = prompts(12, 5)
    assert_equal_at_tokens(traced(**inputs), model(**inputs), inputs["attention_mask"])


def test_what_is_wrong_with_the_ids_is_noticed_outside_a_graph(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="<sop>"):
        model(torch.tensor([[20, 21, SOP]]), torch.ones(1, 3))


def assert_equal_at_tokens(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
