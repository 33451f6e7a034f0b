"""flex_attention over packed rows: the same visibility, losses and gradients as by a mask, and what is refused.

On a CPU PyTorch allows no backward pass of it. Its plain form, which these tests call, has one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers.integrations import flex_attention as integration

from conftest import EOP, GMASK, MASK, ORDINARY, PAD, SOP
from gmask.errors import GmaskError
from gmask.infilling.blanks import BlankTokens, blank_out
from gmask.infilling.collator import collate
from gmask.models.base import FLEX
from gmask.models.glm import GLMForConditionalGeneration
from gmask.models.layout import block_mask, visible_keys
from gmask.recipes.pretraining import load_recipe
from gmask.training import pretrain
from gmask.training.run_folder import read_metrics
from pretraining_data import NO_DROPOUT

SPECIAL = BlankTokens(mask=MASK, smask=6, gmask=GMASK, sop=SOP, eop=EOP, pad=PAD, cls=2, eos=1)
NO_DROPOUTS = dict.fromkeys(("embedding_dropout", "attention_dropout", "hidden_dropout"), 0.0)
BuildGLM = Callable[..., GLMForConditionalGeneration]


@pytest.fixture
def packed() -> dict[str, Tensor]:
    """Two rows of 160 tokens, more than one block of 128: blanks within texts and at their ends, and padding."""
    rng = np.random.default_rng(0)
    made = []
    for length, spans, mask in (
        (60, [[3, 9], [20, 22], [50, 55]], MASK),
        (50, [[20, 50]], GMASK),
        (24, [[4, 8]], MASK),
        (110, [[60, 110]], GMASK),
        (30, [[0, 5], [12, 13]], MASK),
    ):
        order = rng.permutation(len(spans))
        tokens = rng.choice(ORDINARY, length)
        made.append(blank_out(tokens, np.array(spans), mask=mask, special=SPECIAL, objective="token", order=order))
    return collate([made[:3], made[3:]], row_length=160, pad_id=PAD)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets flex_attention run as it is written, with gradients; notes its block masks."""
    noted = []

    def plain(*args: Any, training: bool = False, **kwargs: Any) -> Any:
        noted.append(kwargs["block_mask"])
        return flex_attention.flex_attention(*args, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    return noted


def losses_and_gradients(model: GLMForConditionalGeneration, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    losses = model.token_losses(**batch)
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_block_mask_shows_what_the_mask_shows(packed: dict[str, Tensor]) -> None:
    in_context, sequences = packed["layout"][:, 1] == 0, packed["sequence_ids"]
    blocks = block_mask(in_context, sequences)
    dense = flex_attention.create_mask(blocks.mask_mod, 2, 1, 160, 160, device="cpu")
    assert torch.equal(dense, visible_keys(in_context, key_length=160, sequence_ids=sequences))
    halves = torch.arange(256)[None] // 128  # two sequences that do not share a block
    assert block_mask(torch.ones(1, 256, dtype=torch.bool), halves).to_dense().tolist() == [[[[1, 0], [0, 1]]]]


@pytest.mark.filterwarnings("ignore")  # that it is not compiled, and one of the compiler
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_losses_and_gradients_are_those_of_the_mask(
    build_glm: BuildGLM, packed: dict[str, Tensor], calls: list[Any], checkpointing: bool
) -> None:
    model = build_glm(**NO_DROPOUTS).train()
    expected = losses_and_gradients(model, packed)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.set_attn_implementation(FLEX)
    found = losses_and_gradients(model, packed)
    assert len(calls) == model.config.num_hidden_layers * (1 + checkpointing)
    assert all(isinstance(mask, flex_attention.BlockMask) for mask in calls)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_rows_that_are_not_packed_are_read_as_before(
    build_glm: BuildGLM, packed: dict[str, Tensor], calls: list[Any]
) -> None:
    model = build_glm().eval()
    ids = packed["input_ids"][:, :40]
    answers = []
    for name in ("sdpa", FLEX):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits = model(ids[:, :20], layout=packed["layout"][:, :, :20], use_cache=True)
            answers.append(logits.logits)
    torch.testing.assert_close(*answers)
    assert not calls


@pytest.mark.filterwarnings("ignore")
def test_a_run_makes_the_same_steps(recipe_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(pretrain.Pretraining, "_check_attention", lambda training: None)
    losses = []
    for attention in ("sdpa", "flex"):
        overrides = [*NO_DROPOUT, f"optimization.attention={attention}", f"run.out={recipe_path.parent / attention}"]
        pretrain.run_pretraining(str(recipe_path), [*overrides, "optimization.steps=3"])
        log = read_metrics(recipe_path.parent / attention / "metrics.jsonl")
        losses.append([(record["loss"], record["gradient_norm"]) for record in log])
        assert bool(calls) == (attention == "flex")
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled for a GPU")
def test_compiled_on_a_gpu(build_glm: BuildGLM, packed: dict[str, Tensor]) -> None:
    model = build_glm(hidden_size=64, num_attention_heads=2, **NO_DROPOUTS).train().to("cuda")
    batch = {name: value.to("cuda") for name, value in packed.items()}
    expected = losses_and_gradients(model, batch)
    model.set_attn_implementation(FLEX)
    for ours, theirs in zip(losses_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)


def test_a_run_that_cannot_use_it_says_so(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flex = "optimization.attention=flex"
    with pytest.raises(GmaskError, match="flex trains on CUDA alone, and this run is on cpu"):
        pretrain.Pretraining(load_recipe(recipe_path, [flex, *NO_DROPOUT, "run.device=cpu"]))
    monkeypatch.setattr(pretrain, "find_device", lambda device: "cuda")
    with pytest.raises(GmaskError, match=r"flex has no dropout: set model\.attention_dropout to 0"):
        pretrain.Pretraining(load_recipe(recipe_path, [flex]))
    assert not (tmp_path / "out").exists()
