"""Does each method train what it says, and nothing else, and are its settings checked?"""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import gmask
from gmask.errors import GmaskError
from gmask.generation.encoding import TextReader
from gmask.generation.score import Scorer
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.quantization.linear import QuantizedLayer, QuantLinear
from gmask.recipes.tuning import OWNERS, RATES, USUAL_RATES, MethodSettings, hint_learning_rate
from gmask.training.methods import RankSchedule, apply_method, count_trainable
from tuning import BUILDERS, METHODS, STEPS, batch_of, build_chatglm, build_glm_of, train, tune

PROMPTED = MethodSettings(name="p-tuning", prompt_tokens=2)


def numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters, by the names that they had before layers were put in."""
    return {name.replace(".base_layer", ""): parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_and_the_model_stays_as_it_was(family: str, name: str) -> None:
    model = BUILDERS[family]()
    before = numbers(model)
    losses = tune(model, name)
    assert losses[-1] < 0.8 * losses[0]
    after = numbers(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.isdisjoint(before), "what trains was added"
    assert trained and len(trained) < len(after)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", ["full", "frozen-embeddings"])
def test_all_weights_train_but_the_word_embeddings_where_these_are_frozen(family: str, name: Any) -> None:
    model = BUILDERS[family]().bfloat16()
    before = numbers(model)
    table = apply_method(model, MethodSettings(name=name))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    losses = train(model, rate=0.005)
    assert losses[-1] < 0.8 * losses[0]
    unchanged = {key for key, value in numbers(model).items() if torch.equal(value, before[key].float())}
    embedding = "glm.word_embeddings.weight" if family == "glm" else "transformer.word_embeddings.weight"
    assert unchanged == ({embedding} if name == "frozen-embeddings" else set())
    frozen = model.get_input_embeddings().weight.numel() if name == "frozen-embeddings" else 0
    assert table.total - table.trainable == frozen


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_float32_beside_a_bfloat16_model(name: str) -> None:
    model = build_glm_of().bfloat16()
    losses = tune(model, name)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters() if parameter.ndim > 1}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert model.dtype == torch.bfloat16 and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("network", ["lstm", "mlp", "none"])
def test_trained_vectors_stand_in_the_text_and_learn(network: Any) -> None:
    model = build_glm_of()
    before = numbers(model)
    apply_method(model, dataclasses.replace(PROMPTED, prompt_encoder=network))
    inputs = batch_of(model)
    first = model.config.prompt_ids[0]
    assert list(model.config.prompt_ids) == [48, 49], "behind the vocabulary"
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 0] = first
    inputs["input_ids"][0, 1] = first + 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    after = numbers(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_trained_vectors_begin_as_words() -> None:
    model = build_glm_of()
    words = {tuple(row.tolist()) for row in model.get_input_embeddings().weight}
    apply_method(model, PROMPTED)
    assert {tuple(row.tolist()) for row in model.glm.prompt_encoder.embedding.weight} <= words


def test_the_markers_of_a_text_are_its_trained_vectors_in_order() -> None:
    model, tokenizer = gmask.load(device="cpu")
    apply_method(model, dataclasses.replace(PROMPTED, prompt_tokens=3))
    first = model.config.vocab_size
    scorer = Scorer(model, tokenizer)
    plain = TextReader(tokenizer).read("It was [MASK] today.").context
    marked = scorer.reader.read("[PROMPT] [PROMPT]It was [MASK] [PROMPT] today.").context
    end = plain.blanks[0] + 1
    assert marked.ids == (plain.ids[0], first, first + 1, *plain.ids[1:end], first + 2, *plain.ids[end:])
    unmarked = scorer.reader.read("It was [MASK] today.").context
    assert unmarked.ids == (plain.ids[0], first, first + 1, first + 2, *plain.ids[1:])
    assert unmarked.blanks == tuple(place + 3 for place in plain.blanks)
    escaped = scorer.reader.read("\\[PROMPT] was [MASK].")
    assert escaped.pieces[0] == "[PROMPT] was " and not set(escaped.context.ids[4:]) & set(model.config.prompt_ids)
    for text in ("[PROMPT] It was [MASK].", "[PROMPT] [PROMPT] [PROMPT] [PROMPT] [MASK]"):
        with pytest.raises(GmaskError, match="write one for each, or none"):
            scorer.reader.read(text)
    assert "[PROMPT]" in TextReader(tokenizer).read("[PROMPT] [MASK]").pieces[0]


@pytest.mark.parametrize("name", ["lora", "p-tuning-v2"])
def test_the_bundled_model_learns_an_answer_that_it_finds_absurd(name: str) -> None:
    model, tokenizer = gmask.load(device="cpu")
    text, answer = "The capital of France is [MASK].", "a purple piano"
    before = gmask.score(model, tokenizer, text, [answer]).best.logprob
    context = TextReader(tokenizer).read(text).context
    ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    row = torch.tensor([[*context.ids, model.config.sop_token_id, *ids]])
    labels = torch.tensor([[-100] * len(context.ids) + [*ids, model.config.eop_token_id]])
    torch.manual_seed(0)
    settings = {"lora": MethodSettings(), "p-tuning-v2": MethodSettings(name="p-tuning-v2", prefix_length=8)}
    apply_method(model, settings[name])
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr={"lora": 5e-3, "p-tuning-v2": 0.1}[name]
    )
    for _ in range(8):
        optimizer.zero_grad()
        model(row, labels=labels).loss.backward()
        optimizer.step()
    assert gmask.score(model, tokenizer, text, [answer]).best.logprob > before + 4


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "p-tuning-v2"])
def test_integers_pass_the_gradients_of_the_weights_that_they_stand_for(bits: int, name: str) -> None:
    """The same method on the dequantized float model must have the same loss and gradients."""
    model = build_glm_of().quantize(bits)
    plain = build_glm_of()
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            plain.get_submodule(path).weight.data = layer.dequantize()
    settings = dataclasses.replace(METHODS[name], name="qlora") if name == "lora" else METHODS[name]
    found = {}
    for one in (model, plain):
        torch.manual_seed(7)
        apply_method(one, METHODS[name] if one is plain else settings, steps=STEPS)
        with torch.no_grad():
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        loss = one.train()(**batch_of(one)).loss
        loss.backward()
        gradients = {key: value.grad for key, value in one.named_parameters() if value.grad is not None}
        found[one] = {"loss": loss.detach(), **gradients}
    assert found[model].keys() == found[plain].keys() and len(found[model]) > 1
    torch.testing.assert_close(found[model], found[plain], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", BUILDERS)
def test_qlora_trains_beside_packed_integers_that_stay(family: str) -> None:
    model = BUILDERS[family]().quantize(4)
    before = {name: layer.weight.clone() for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    table = apply_method(model, MethodSettings(name="qlora", rank=4, targets="all-linear"))
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    for name, weight in before.items():
        assert torch.equal(model.get_submodule(f"{name}.base_layer").weight, weight)
    whole = apply_method(BUILDERS[family](), MethodSettings(rank=4, targets="all-linear"))
    assert (table.trainable, table.total) == (whole.trainable, whole.total), "int4 counts as the numbers it stands for"


def test_the_table_adds_up() -> None:
    model = build_glm_of()
    table = apply_method(model, MethodSettings(rank=2))
    added = 2 * 2 * (32 + 96)  # layers, rank, rows and columns
    assert table.trainable == added == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.total == sum(p.numel() for p in model.parameters())
    rows = {row.module: row for row in table.rows}
    assert rows["glm.transformer.layers.*.attention.query_key_value"].tensors == 4
    assert rows["glm.transformer.layers.*.attention.query_key_value.lora_A"].percent == 100
    *_, last = table.to_rows().rows
    assert last == ("all", f"{added:,}", f"{table.total:,}", last[-1])
    assert "lora_B" in table.to_rows().to_markdown()
    assert all(int(row[1].replace(",", "")) for row in table.to_rows().rows[:-2]), "what is frozen is one row"


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "p-tuning-v2", "full"])
def test_the_table_is_whole_in_80_columns(method: str) -> None:
    targets = {"targets": "all-linear"} if method in ("lora", "adalora") else {}
    table = apply_method(build_glm_of(), MethodSettings(name=method, **targets), steps=1000)
    console = Console(file=io.StringIO(), width=80)
    console.print(table.to_rows().to_rich("What trains"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert all(row[0] in shown for row in table.to_rows().rows)


def test_the_head_for_a_task_trains_with_every_method() -> None:
    for settings in (METHODS["lora"], METHODS["p-tuning-v2"]):
        base = build_glm_of()
        model = GLMForSequenceClassification(copy.deepcopy(base.config))
        model.glm = base.glm  # as a run puts a head on a model, whose body then has a config of its own
        model.bfloat16()
        apply_method(model, settings)
        trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        head = {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
        assert head < trained.keys() and set(trained.values()) == {torch.float32}
        inputs = {key: value for key, value in batch_of(model).items() if key != "labels"}
        model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        assert all(model.get_parameter(name).grad is not None for name in trained), "also what was added is used"


def test_adalora_ends_with_the_ranks_that_were_asked_for_and_resumes_exactly() -> None:
    """Also where packing has left fewer steps than were known of when it was made ready."""
    model, again = build_glm_of(), build_glm_of()
    for one, steps in ((model, 50 * STEPS), (again, STEPS)):
        torch.manual_seed(3)
        apply_method(one, METHODS["adalora"], steps=steps)
    train(model, rate=0.05)
    left = sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)
    assert left == 2 * METHODS["adalora"].rank
    schedule = RankSchedule.of(again)
    assert schedule is not None and RankSchedule.of(build_glm_of()) is None
    for step in range(1, 6):
        again.zero_grad()
        again(**batch_of(again)).loss.backward()
        schedule.update(step)
    other = RankSchedule(again)
    other.restore(schedule.state())
    other.update(6)
    expected = {name: p.detach().clone() for name, p in again.named_parameters() if "lora_E" in name}
    schedule.update(6)
    assert all(torch.equal(again.get_parameter(name), value) for name, value in expected.items())
    assert schedule.penalty() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lorra"}, "method.name is 'lorra': choose full, "),
        ({"name": "p-tuning-v2", "rank": 4}, "method.rank belongs to lora, dora, adalora or qlora, not to p-tuning-v2"),
        ({"prefix_length": 12}, "method.prefix_length belongs to p-tuning-v2, not to lora"),
        ({"name": "full", "dropout": 0.1}, "method.dropout belongs to"),
        ({"name": "ia3", "targets": "dense"}, "method.targets belongs to lora"),
        ({"rank": 0}, "method.rank is 0: it must be above 0"),
        ({"dropout": 1.0}, "method.dropout is 1.0: it must be from 0 to below 1"),
        ({"alpha": 0}, "method.alpha is 0: it must be above 0"),
        ({"alpha": float("nan")}, "method.alpha is nan: expected a finite number"),
        ({"targets": 3}, "method.targets is 3: expected query_key_value, "),
        ({"targets": []}, "method.targets is empty"),
        ({"targets": ["q_proj"]}, "method.targets is 'q_proj': choose query_key_value"),
        ({"name": "p-tuning", "prompt_encoder": "gru"}, "method.prompt_encoder is 'gru'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GmaskError, match=message.replace("[", r"\[")):
        MethodSettings(**settings)


@given(st.sampled_from([name for name in RATES]), st.sampled_from(sorted(OWNERS)))
def test_settings_are_read_back_as_they_were(name: Any, key: str) -> None:
    changed = {"targets": ["dense"], "projection": True, "prompt_encoder": "mlp", "dropout": 0.5}.get(key, 3)
    settings = {"name": name, key: changed} if name in OWNERS[key] else {"name": name}
    made = MethodSettings(**settings)
    assert MethodSettings(**dataclasses.asdict(made)) == made
    assert made.makes_adapter == (name not in ("full", "frozen-embeddings"))
    assert hint_learning_rate(name, USUAL_RATES[name]) is None


def test_a_rate_of_another_method_is_hinted_at() -> None:
    hint = hint_learning_rate("p-tuning-v2", 1e-4)
    assert hint is not None and "0.003 to 0.03 is common" in hint and "0.0001 is one for lora" in hint
    assert "3e-05 is one for full" in str(hint_learning_rate("p-tuning-v2", 3e-5))
    assert "2e-05 is unusual for lora" in str(hint_learning_rate("lora", 2e-5))
    assert "0.02 is one for p-tuning-v2" in str(hint_learning_rate("full", 0.02))
    assert "0.0005 to 0.01 is common, 0.0002 is one for lora" in str(hint_learning_rate("p-tuning", 2e-4))


def test_targets_name_each_layer_once() -> None:
    assert MethodSettings(targets=("dense", "dense")).layers == ("dense",)
    assert MethodSettings(targets=("dense", "all-linear")).layers == MethodSettings(targets="all-linear").layers


@pytest.mark.parametrize(
    ("settings", "bits", "message"),
    [
        (MethodSettings(name="qlora"), None, "to int8 or int4, or choose lora"),
        (MethodSettings(name="dora"), 8, "dora needs the norms of the float weights"),
        (MethodSettings(name="full"), 4, "integers cannot be trained"),
        (MethodSettings(name="frozen-embeddings"), 8, "integers cannot be trained"),
        (MethodSettings(name="adalora"), None, "at least 10 steps"),
    ],
)
def test_methods_that_a_model_cannot_be_trained_by_are_refused(settings, bits, message: str) -> None:
    model = build_glm_of() if bits is None else build_glm_of().quantize(bits)
    with pytest.raises(GmaskError, match=message):
        apply_method(model, settings, steps=5)


def test_a_second_adapter_is_refused() -> None:
    model = build_chatglm()
    apply_method(model, METHODS["lora"])
    with pytest.raises(GmaskError, match="has an adapter already"):
        apply_method(model, METHODS["ia3"])
    with pytest.raises(GmaskError, match="for a ChatGLM choose p-tuning-v2"):
        apply_method(build_chatglm(), PROMPTED)
    assert count_trainable(model).trainable > 0
