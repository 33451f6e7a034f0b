"""Do the heads choose and classify as their users expect, beyond the numbers that the goldens hold?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

from conftest import GMASK, MASK, ORDINARY, PAD, SHAPE, SOP, SPECIAL
from gmask.models.glm import GLMConfig
from gmask.models.glm_heads import (
    GLMForMultipleChoice,
    GLMForMultiTokenCloze,
    GLMForSequenceClassification,
    GLMForSingleTokenCloze,
)

HEADS = [GLMForMultipleChoice, GLMForMultiTokenCloze, GLMForSingleTokenCloze, GLMForSequenceClassification]
CONTEXT = [16, 17, MASK, 18]
CHOICES = [[20, 21], [22], [23, 24, 25]]


def build(model_class: type[PreTrainedModel], *, attention: str = "sdpa", seed: int = 0, **settings: Any):
    config = GLMConfig(**{**SHAPE, **SPECIAL, **settings})
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def side_by_side(context: list[int], choices: list[list[int]]) -> dict[str, Any]:
    """One row of a multiple choice: the context, and the choices as pieces that see it and themselves alone."""
    ids, places, starts = list(context), list(range(len(context))), [0] * len(context)
    indices, visible = [], torch.zeros(1, 1, 64, 64, dtype=torch.long)
    visible[..., : len(context)] = 1
    for choice in choices:
        first = len(ids)
        ids += [SOP, *choice[:-1]]
        indices.append(list(range(first, len(ids))))
        places += [context.index(MASK)] * len(choice)
        starts += range(1, len(choice) + 1)
        visible[..., first : len(ids), first : len(ids)] = torch.ones(len(choice), len(choice)).tril().long()
    return dict(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([[places, starts]]),
        attention_mask=visible[..., : len(ids), : len(ids)],
        choice_ids=[choices],
        choice_indices=[indices],
    )


def rows_of_choices(context: list[int], choices: list[list[int]]) -> dict[str, Tensor]:
    """The same choices as a multi-token cloze ``[1, C, T]``: from the token ids alone, padded on the right."""
    width = len(context) + max(map(len, choices))
    inputs, targets, mask = [], [], []
    for choice in choices:
        row = [*context, SOP, *choice[:-1]]
        rest = width - len(row)
        inputs.append(row + [PAD] * rest)
        targets.append([-100] * len(context) + choice + [-100] * rest)
        mask.append([1] * len(row) + [0] * rest)
    return dict(
        input_ids=torch.tensor([inputs]), target_ids=torch.tensor([targets]), attention_mask=torch.tensor([mask])
    )


@torch.no_grad()
def test_choices_side_by_side_score_as_each_in_a_row_of_its_own() -> None:
    together = build(GLMForMultipleChoice)(**side_by_side(CONTEXT, CHOICES), labels=torch.tensor([2]))
    apart = build(GLMForMultiTokenCloze)(**rows_of_choices(CONTEXT, CHOICES), labels=torch.tensor([2]))
    assert together.logits.shape == (1, 3)
    assert torch.allclose(together.logits, apart.logits, atol=1e-5)
    assert torch.allclose(together.loss, apart.loss, atol=1e-5)


@torch.no_grad()
def test_a_row_with_fewer_choices_never_picks_one_that_it_lacks() -> None:
    model = build(GLMForMultipleChoice)
    wide, narrow = side_by_side(CONTEXT, CHOICES), side_by_side(CONTEXT, CHOICES[:2])
    both = {
        name: wide[name].expand(2, *wide[name].shape[1:]) for name in ("input_ids", "position_ids", "attention_mask")
    }
    for name in ("choice_ids", "choice_indices"):
        both[name] = wide[name] + narrow[name]
    output = model(**both, labels=torch.tensor([0, 1]))
    assert torch.isneginf(output.logits[1, 2]) and output.loss.isfinite()
    assert torch.allclose(output.logits[1, :2], model(**narrow).logits[0], atol=1e-5)


@torch.no_grad()
def test_the_length_penalty_divides_by_a_power_of_the_number_of_tokens() -> None:
    model, inputs = build(GLMForMultiTokenCloze), rows_of_choices(CONTEXT, CHOICES)
    plain, mean = model(**inputs).logits, model(**inputs, length_penalty=1.0).logits
    assert torch.allclose(mean, plain / torch.tensor([2, 1, 3]))


@torch.no_grad()
def test_a_single_token_cloze_reads_its_place_off_the_ids_or_off_the_prefix_length() -> None:
    model = build(GLMForSingleTokenCloze)
    ids = torch.tensor([[16, 17, MASK, 18, SOP], [16, MASK, SOP, PAD, PAD]])
    targets = torch.tensor([[20, 21], [22, 23]])
    derived = model(ids, (ids != PAD).long(), target_ids=targets).logits
    places = torch.tensor([[[0, 1, 2, 3, 2], [0, 0, 0, 0, 1]], [[0, 1, 1, 1, 1], [0, 0, 1, 2, 3]]])
    published = model(ids, torch.tensor([4, 2]), position_ids=places, target_ids=targets).logits
    assert torch.allclose(derived, published, atol=1e-5)


def test_choices_of_unequal_ids_and_places_are_refused() -> None:
    inputs = side_by_side(CONTEXT, CHOICES)
    inputs["choice_indices"] = [inputs["choice_indices"][0][::-1]]
    with pytest.raises(ValueError, match="differ in the lengths"):
        build(GLMForMultipleChoice)(**inputs)


@pytest.mark.parametrize("pool_token", ["cls", "start", "pad"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_by_a_tokenizer_changes_no_class(pool_token: str, side: str) -> None:
    model = build(GLMForSequenceClassification, pool_token=pool_token, num_labels=3)
    rows = [[16, 17, GMASK, 18, 19, SOP], [20, MASK, 21, SOP]]
    alone = torch.cat([model(torch.tensor([row])).logits for row in rows])
    padding = [[PAD] * (6 - len(row)) for row in rows]
    padded = [pad + row if side == "left" else row + pad for pad, row in zip(padding, rows, strict=True)]
    ids = torch.tensor(padded)
    assert torch.allclose(model(ids, (ids != PAD).long()).logits, alone, atol=1e-5)


@torch.no_grad()
def test_the_three_poolings_read_the_first_the_sop_and_the_last_context_token() -> None:
    ids = torch.tensor([[16, 17, GMASK, 18, 19, SOP]])
    for pool_token, place in (("cls", 0), ("start", 5), ("pad", 4)):
        model = build(GLMForSequenceClassification, pool_token=pool_token)
        state = model.glm(ids).last_hidden_state[:, place]
        assert torch.allclose(model(ids).logits, model.out_proj(torch.tanh(model.dense(state))))


@torch.no_grad()
def test_a_text_without_an_answer_is_classified_by_its_last_token_but_not_by_its_sop() -> None:
    ids = torch.tensor([[16, 17, 18, PAD]])
    mask = torch.tensor([[1, 1, 1, 0]])
    model = build(GLMForSequenceClassification, pool_token="pad")
    assert torch.allclose(model(ids, mask).logits, model(ids[:, :3]).logits, atol=1e-5)
    with pytest.raises(ValueError, match="end each text with <sop>"):
        build(GLMForSequenceClassification, pool_token="start")(ids[:, :3])


@pytest.mark.parametrize(
    "labels, settings, loss",
    [
        (torch.tensor([2, 0]), dict(num_labels=3), F.cross_entropy),
        (torch.tensor([0.5, -1.0]), dict(num_labels=1), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), dict(num_labels=3), F.binary_cross_entropy_with_logits),
        (
            torch.tensor([[0.1, 2.0], [1.0, 0.3]]),
            dict(num_labels=2, problem_type="regression"),
            F.mse_loss,
        ),
    ],
    ids=["one class", "regression", "several labels", "regression on two"],
)
@torch.no_grad()
def test_the_loss_follows_the_labels_and_the_problem_type(
    labels: Tensor, settings: dict[str, Any], loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model = build(GLMForSequenceClassification, **settings)
    output = model(torch.tensor([[16, 17, 18], [19, 20, 21]]), labels=labels)
    assert torch.allclose(output.loss, loss(output.logits, labels))


def inputs_of(model_class: type[PreTrainedModel]) -> dict[str, Any]:
    """A row for each head, with its label."""
    if model_class is GLMForMultipleChoice:
        inputs = side_by_side(CONTEXT, CHOICES)
    elif model_class is GLMForMultiTokenCloze:
        inputs = rows_of_choices(CONTEXT, CHOICES)
    else:
        inputs = {"input_ids": torch.tensor([[*CONTEXT, SOP]])}
    if model_class is GLMForSingleTokenCloze:
        inputs["target_ids"] = torch.tensor([[20, 21, 22]])
    return {**inputs, "labels": torch.tensor([1])}


@pytest.mark.parametrize("model_class", HEADS)
def test_checkpointed_gradients_equal_plain_ones(model_class: type[PreTrainedModel]) -> None:
    quiet = dict(hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0)
    plain, checkpointed = build(model_class, **quiet).train(), build(model_class, **quiet).train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(**inputs_of(model_class)).loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in checkpointed.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


@pytest.mark.parametrize("model_class", HEADS)
@torch.no_grad()
def test_a_saved_head_computes_the_same_when_loaded(model_class: type[PreTrainedModel], tmp_path: Path) -> None:
    model = build(model_class, pool_token="pad")
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs_of(model_class)).logits, model(**inputs_of(model_class)).logits)


def test_a_saved_classifier_has_the_published_keys(tmp_path: Path) -> None:
    build(GLMForSequenceClassification).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        head = {key for key in file.keys() if not key.startswith("glm.")}  # noqa: SIM118 - no dict
    assert head == {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_rows_that_see_nothing_stay_numbers_in_half_precision(attention: str, dtype: torch.dtype) -> None:
    model = build(GLMForMultipleChoice, attention=attention, initializer_range=1.0).to(dtype)
    inputs = side_by_side(CONTEXT, CHOICES)
    inputs["input_ids"] = F.pad(inputs["input_ids"], (0, 3))  # the published builder pads with id 0
    inputs["position_ids"] = F.pad(inputs["position_ids"], (0, 3))
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 3, 0, 3))
    output = model(**inputs, labels=torch.tensor([0]), output_hidden_states=True)
    assert output.logits.dtype == torch.float32
    assert all(states.isfinite().all() for states in (output.logits, output.loss, *output.hidden_states))


def test_trainer_fits_the_classes_however_the_batch_is_cut(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(ORDINARY.start, ORDINARY.stop, (16, 6), generator=generator)
    rows = [{"input_ids": text, "labels": int(text[0] % 2)} for text in texts]
    losses = []
    for rows_per_step, steps_joined in ((8, 1), (4, 2)):
        model = build(GLMForSequenceClassification, hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=rows_per_step,
            gradient_accumulation_steps=steps_joined,
            max_steps=12,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
