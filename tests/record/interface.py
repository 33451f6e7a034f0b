"""Which names does `import gmask` give, how are they called, and what do they return?"""

import dataclasses
import inspect
import re
from collections.abc import Generator
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

import gmask
from record.files import describe_folder
from record.session import Session, make_glm

KINDS = (PreTrainedModel, PreTrainedConfig, GenerationMixin, ValueError)
TEXT = "The [MASK] dog [MASK]."


def record_names(session: Session) -> dict[str, Any]:
    """Every public name; of a class its public methods and properties too, as far as gmask defines them."""
    return {name: _describe(getattr(gmask, name)) for name in gmask.__all__ if name != "__version__"}


def _describe(value: Any) -> Any:
    if not inspect.isclass(value):
        return _signature(value)
    members = {"is a": ", ".join(one.__name__ for one in KINDS if issubclass(value, one))}
    if not issubclass(value, BaseException):
        members["__init__"] = _signature(value)
    for one in reversed(value.__mro__):
        if one.__module__.startswith("gmask"):
            for name, member in vars(one).items():
                if not name.startswith("_") and (text := _member(member)):
                    members[name] = text
    return members


def _member(member: Any) -> str | None:
    """None for attributes: those of dataclasses are parameters of ``__init__`` already."""
    if isinstance(member, staticmethod | classmethod):
        return f"{type(member).__name__} {_signature(member.__func__)}"
    if isinstance(member, property):
        return "property"
    return _signature(member) if inspect.isfunction(member) else None


def _signature(value: Any) -> str:
    """A signature without the modules of our types, which may move."""
    text = str(inspect.signature(value))
    text = re.sub(r"\bgmask(\.\w+)+\.(?=\w)", "", text)
    return re.sub(r"<(class|function) '?[\w.]*?(\w+)'?( at 0x\w+)?>", r"\2", text)


def plain(value: Any) -> Any:
    """A result as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def drain(fragments: Generator[Any, None, Any]) -> dict[str, Any]:
    """All that a generator gives, and what it returns."""
    given = []
    try:
        while True:
            given.append(plain(next(fragments)))
    except StopIteration as done:
        return {"given": given, "returned": plain(done.value)}


@torch.no_grad()
def record_calls(session: Session) -> dict[str, Any]:
    with session.entered():
        model, tokenizer = gmask.load("tiny")
        found: dict[str, Any] = {
            "infill": plain(gmask.infill(model, tokenizer, TEXT, max_tokens=5)),
            "infill, texts": plain(gmask.infill(model, tokenizer, [TEXT, "我[MASK]苹果"], max_tokens=3, n=2, seed=1,
                                                temperature=0.7)),
            "infill, choices": plain(gmask.infill(model, tokenizer, "The [MASK] dog.", choices=["old", "new"])),
            "stream_infill": drain(gmask.stream_infill(model, tokenizer, TEXT, max_tokens=5)),
            "score": plain(gmask.score(model, tokenizer, "The [MASK] dog.", ["old", "new"])),
            "score, texts": plain(gmask.score(model, tokenizer, ["A [MASK].", "The [MASK] dog."], ["old", "new"],
                                              normalization="mean")),
            "embed": plain(gmask.embed(model, tokenizer, ["a sunny day", "今天"], pooling="first", normalize=False)),
            "reply_all": plain(gmask.reply_all(model, tokenizer, [
                [{"role": "user", "content": "The dog?"}],
                [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."},
                 {"role": "user", "content": "And?"}],
            ], max_tokens=5, seed=2)),
            "Chat": _talk(gmask.Chat(model, tokenizer, max_tokens=5, temperature=0)),
            **_forward(model, tokenizer),
            **_adapted(session),
            **_heads(session),
        }  # fmt: skip
    return found


def _talk(chat: gmask.Chat) -> list[Any]:
    found: list[Any] = [plain(chat.ask("The dog?")), drain(chat.stream("And?")), chat.messages]
    chat.save("talk.json")
    undone = [chat.undo(), len(chat.messages)]
    chat.load("talk.json")
    return [*found, undone, len(chat.messages)]


def _forward(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Logits of a few tokens, alone and padded; a loss; transformers' generate."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    ids = torch.cat([ids, torch.tensor([[model.config.sop_token_id]])], 1)
    out = model(ids, labels=ids.flip(-1))
    return {
        "forward": {"ids": plain(ids), "logits": plain(out.logits[0, -1, ::16]), "loss": float(out.loss)},
        "generate": plain(model.generate(ids, max_new_tokens=5, do_sample=False)),
        "parameters": [f"{name} {list(value.shape)}" for name, value in model.named_parameters()],
    }


def _adapted(session: Session) -> dict[str, Any]:
    model, tokenizer = gmask.load("tiny")
    gmask.load_adapter(model, "lora")
    scored = plain(gmask.score(model, tokenizer, "The [MASK] dog.", ["old", "new"]))
    gmask.save_adapter(model, "saved", base="tiny")
    merged = gmask.merge_adapter(model)
    again = plain(gmask.score(model, tokenizer, "The [MASK] dog.", ["old", "new"]))
    return {"load_adapter": scored, "save_adapter": describe_folder(session.folder / "saved"),
            "merge_adapter": [merged, again]}  # fmt: skip


def _heads(session: Session) -> dict[str, Any]:
    """What the heads of understanding compute, and how their folders look."""
    ids = torch.tensor([[20, 21, 5, 22, 1, 8], [40, 5, 23, 41, 1, 8]])
    rows = torch.stack([torch.cat([ids, torch.full((2, 1), token)], 1) for token in (30, 31)], 1)
    targets = torch.full_like(rows, -100)
    targets[:, :, -2] = rows[:, :, -1]
    inputs: dict[str, dict[str, Any]] = {
        "GLMForSequenceClassification": {"input_ids": ids},
        "GLMForSingleTokenCloze": {"input_ids": ids, "target_ids": torch.tensor([[30, 31], [32, 33]])},
        "GLMForMultiTokenCloze": {"input_ids": rows, "target_ids": targets},
        "GLMForMultipleChoice": {
            "input_ids": ids, "choice_ids": [[[30], [31]], [[32], [33]]], "choice_indices": [[[5], [5]], [[5], [5]]],
        },
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, given in inputs.items():
        model_class = getattr(gmask, name)
        make_glm(session.folder / name, session.folder / "tokenizer", model_class=model_class)
        model = model_class.from_pretrained(session.folder / name).eval()
        out = model(**given, labels=torch.tensor([0, 1]))
        files = describe_folder(session.folder / name)
        found[name] = {"logits": plain(out.logits), "loss": float(out.loss), "files": files}
    return found
