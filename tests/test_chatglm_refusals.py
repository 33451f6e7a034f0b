"""What does somebody read who has the wrong folder, half of it, or too little memory for it?

One line each, that says what it is and what to do, from every place that reads the folder; the command line exits
with 2. `WAYS` are the places, `FAULTS` what is done to a folder and what is said of it.
"""

import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from transformers import AutoModel, AutoTokenizer

import gmask
from gmask import hardware
from gmask.cli import main
from gmask.tokenizers.chatglm import VOCABULARY_FILE, ChatGLMTokenizerV0
from test_chatglm_chat import VOCABULARY, needs_vocabulary
from test_chatglm_loading import (
    FIRST_VOCABULARY,
    change_config,
    load_error,
    make_first_folder,
    publish,
    read_weights,
    write_weights,
)
from test_chatglm_parity import TINY, load_chatglm

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2706249\n"
CONFIG, SHARD, WHOLE = "config.json", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin"
INT4 = "chatglm-tiny-int4"
LATER = r"ChatGLM2, ChatGLM3 or GLM-4-9B.*gmask\.registration\.unregister\(\)"

WAYS: dict[str, Callable[[Path], Any]] = {
    "load": lambda folder: gmask.load(folder, device="cpu"),
    "AutoModel": AutoModel.from_pretrained,
    "AutoTokenizer": AutoTokenizer.from_pretrained,
    "chat": lambda folder: ["chat", "--model", str(folder), "hello"],
    "quantize": lambda folder: ["quantize", str(folder), str(folder.with_name("quantized"))],
    "info": lambda folder: ["info", str(folder)],
}
VERBS = ("chat", "quantize", "info")
READS_WEIGHTS = ("load", "AutoModel", "chat", "quantize", "info")
READS_NUMBERS = ("load", "AutoModel", "chat")
READS_WORDS = ("load", "AutoTokenizer", "chat", "quantize")
READS_BOTH = ("load", "chat")

pytestmark = needs_vocabulary


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to a folder, and the line that each way answers with."""

    change: Callable[[Path], Any]
    message: str
    ways: Iterable[str]
    others: tuple[tuple[str, str], ...] = ()  # (way, message) of ways that word it otherwise
    case: str = TINY


def make_later(folder: Path) -> None:
    """ChatGLM2-6B: the same model_type and class names, another vocabulary file."""
    (folder / VOCABULARY_FILE).rename(folder / "tokenizer.model")
    later = {"multi_query_attention": True, "padded_vocab_size": 65024, "rmsnorm": True}
    (folder / CONFIG).write_text(json.dumps({"model_type": "chatglm", "architectures": ["ChatGLMModel"], **later}))


def put_other_vocabulary(folder: Path) -> None:
    """That of a later model, by the name that transformers falls back to."""
    (folder / VOCABULARY_FILE).unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=8,
        model_type="char",
        minloglevel=2,
    )


def put_first_vocabulary(folder: Path) -> None:
    (folder / VOCABULARY_FILE).write_bytes(FIRST_VOCABULARY.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')


def keep_later_vocabulary(folder: Path) -> None:
    make_first_folder(folder)
    (folder / VOCABULARY_FILE).write_bytes(VOCABULARY.read_bytes())


def mix_shards(folder: Path) -> None:
    write_weights(folder, {**read_weights(folder), "lm_head.weight": torch.zeros(900, 64)})


def lose(folder: Path, *endings: str, first: bool = False) -> None:
    """Leaves tensors out, all whose names end so or the first of them."""
    whole = folder / WHOLE
    weights = torch.load(whole, weights_only=True) if whole.is_file() else read_weights(folder)
    lost = [key for key in weights if key.endswith(endings)]
    write_weights(folder, {key: value for key, value in weights.items() if key not in (lost[:1] if first else lost)})


def hold_images(folder: Path) -> None:
    write_weights(folder, {**read_weights(folder), "image_encoder.vit.weight": torch.ones(2)})


def put_pointer(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(POINTER)


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


def put_safetensors_pointer(folder: Path) -> None:
    write_weights(folder, {})
    (folder / WHOLE).unlink()
    put_pointer("model.safetensors")(folder)


FAULTS = {
    "ChatGLM2 or later": Fault(make_later, LATER, READS_WEIGHTS),
    "GLM-4": Fault(
        lambda folder: (folder / CONFIG).write_text('{"model_type": "glm", "architectures": ["GlmForCausalLM"]}'),
        r"config\.json: model_type 'glm' .* belongs to GLM-4 or later.*AutoModelForCausalLM",
        ("load", *VERBS),
    ),
    "vocabulary of a later model": Fault(
        put_other_vocabulary, r"tokenizer\.model: not the vocabulary of ChatGLM-6B.*unregister\(\)", ["AutoTokenizer"]
    ),
    "first vocabulary, later weights": Fault(
        put_first_vocabulary, r"has 20856 tokens, but the model only 864; .* all files from one", READS_BOTH
    ),
    "later vocabulary, first weights": Fault(
        keep_later_vocabulary, r"bos_token_id is 516, but that of the model \d+; .* all files from one", READS_BOTH
    ),
    "first config, later weights": Fault(
        set_config(vocab_size=20864),
        r"word_embeddings\.weight has the shape \[864, 64\], but the model asks for \[20864, 64\]; take all files",
        (*READS_NUMBERS, "quantize"),
    ),
    "shards of two revisions": Fault(
        mix_shards,
        r"lm_head\.weight has the shape \[900, 64\], but .* asks for \[864, 64\]",
        (*READS_NUMBERS, "quantize"),
    ),
    "no vocabulary": Fault(
        lambda folder: (folder / VOCABULARY_FILE).unlink(),
        r"ice_text\.model: missing; download or copy it",
        ("load", "chat", "quantize"),
        others=(("AutoTokenizer", r"lacks ice_text\.model, the vocabulary of ChatGLM-6B: copy it there"),),
    ),
    "vocabulary that is none": Fault(
        lambda folder: (folder / VOCABULARY_FILE).write_bytes(b"no pieces"),
        r"ice_text\.model: not a SentencePiece model; download it again",
        READS_WORDS,
    ),
    "int4 without scales": Fault(
        lambda folder: lose(folder, "weight_scale"),
        r"holds no scales.*; download the model again, or quantize it anew",
        (*READS_NUMBERS, "info"),
        others=(("quantize", "is quantized already"),),
        case=INT4,
    ),
    "int4 without one scale": Fault(
        lambda folder: lose(folder, "weight_scale", first=True),
        r"lack their scales \(transformer\.layers\.0.*; download",
        READS_NUMBERS,
        case=INT4,
    ),
    "int4 weights, unquantized config": Fault(
        set_config(quantization_bit=None),
        r"holds quantized weights, where config\.json says nothing of it; take all files from one revision",
        (*READS_NUMBERS, "quantize"),
        case=INT4,
    ),
    "unquantized weights, int4 config": Fault(
        set_config(quantization_bit=4),
        r"the weights are not quantized, though config\.json says so: take quantization_bit out of it",
        READS_NUMBERS,
    ),
    "int4 weights, int8 config": Fault(
        set_config(quantization_bit=8),
        r"shape \[192, 32\], but the model asks for \[192, 64\]; quantization_bit there says another number of bits",
        READS_NUMBERS,
        case=INT4,
    ),
    "3 bits": Fault(set_config(quantization_bit=3), "4 or 8 bits, not in 3", READS_WEIGHTS),
    "16 bits": Fault(set_config(quantization_bit=16), "4 or 8 bits, not in 16", READS_WEIGHTS),
    "int3": Fault(set_config(quantization_bit="int3"), "4 or 8 bits, not in int3", READS_WEIGHTS),
    "images, by the class": Fault(
        set_config(architectures=["ChatGLMForConditionalGenerationWithImage"]),
        r"VisualGLM, which reads images too.*use github\.com/THUDM/VisualGLM-6B",
        READS_WEIGHTS,
    ),
    "images, by the config": Fault(
        set_config(eva_config={"num_layers": 39}, image_length=32),
        r"eva_config belongs to VisualGLM.*use github\.com/THUDM/VisualGLM-6B",
        READS_WEIGHTS,
    ),
    "images, by the weights": Fault(
        hold_images,
        r"image_encoder belongs to VisualGLM.*use github\.com/THUDM/VisualGLM-6B",
        (*READS_NUMBERS, "quantize"),
    ),
    "pointer to weights": Fault(put_pointer(SHARD), rf"{SHARD}: a Git LFS pointer.*git lfs pull", READS_WEIGHTS),
    "pointer to safetensors": Fault(
        put_safetensors_pointer, r"model\.safetensors: a Git LFS pointer.*git lfs pull", READS_WEIGHTS
    ),
    "pointer to the vocabulary": Fault(
        put_pointer(VOCABULARY_FILE), r"ice_text\.model: a Git LFS pointer.*git lfs pull", READS_WORDS
    ),
    "lost tensor": Fault(
        lambda folder: lose(folder, "layers.1.mlp.dense_4h_to_h.bias"),
        r"the weights lack transformer\.layers\.1\.mlp\.dense_4h_to_h\.bias;",
        (*READS_NUMBERS, "quantize"),
    ),
    "special ids beyond the vocabulary": Fault(
        set_config(gmask_token_id=None),
        r"config\.json: gmask_token_id 130001 is beyond the vocab_size",
        ("load", *VERBS),
    ),
    "heads that do not divide": Fault(
        set_config(num_attention_heads=3), r"hidden_size 64 is not a multiple of 12", ("load", *VERBS)
    ),
}
CASES = [
    pytest.param(fault, way, message, id=f"{name}-{way}")
    for name, fault in FAULTS.items()
    for way, message in (*((way, fault.message) for way in fault.ways), *fault.others)
]


def type_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["gmask", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def refuse(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a way answers with."""
    if way not in VERBS:
        with pytest.raises(gmask.GmaskError) as caught:
            WAYS[way](folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)
    capsys.readouterr()
    assert type_command(WAYS[way](folder), monkeypatch) == 2
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)
    return printed.err


@pytest.mark.parametrize(("fault", "way", "message"), CASES)
def test_a_fault_is_one_line_that_says_what_it_is_and_what_to_do(
    fault: Fault, way: str, message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = publish(tmp_path / "chatglm-6b", fault.case)
    fault.change(folder)
    assert re.search(message, refuse(way, folder, monkeypatch, capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["chatglm-6b"], "nothing is written"


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if "load" in fault.ways])
def test_what_is_loaded_names_its_folder(name: str, tmp_path: Path) -> None:
    folder = publish(tmp_path / "chatglm-6b", FAULTS[name].case)
    FAULTS[name].change(folder)
    assert load_error(folder).startswith(str(folder))


@pytest.mark.parametrize("way", READS_NUMBERS)
def test_too_little_memory_is_told_with_the_numbers_and_what_needs_less(
    way: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = publish(tmp_path / "chatglm-6b")
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 600_000)
    message = r"needs 1\.0 MB of memory on cpu, 0\.6 MB are free; dtype='bfloat16' needs 0\.5 MB"
    assert re.search(message, refuse(way, folder, monkeypatch, capsys))


MISFITS = {
    "weights of other numbers": (hold_images, "no: image_encoder belongs to VisualGLM"),
    "a lost tensor": (
        lambda folder: lose(folder, "dense_4h_to_h.bias", first=True),
        "no: the weights lack transformer.",
    ),
    "two revisions": (mix_shards, "no: lm_head.weight has the shape [900, 64], but the model asks for [864, 64]"),
    "nothing": (lambda folder: None, "yes"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_info_tells_whether_the_weights_fit_the_config(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = publish(tmp_path / "chatglm-6b")
    change, verdict = MISFITS[name]
    change(folder)
    assert type_command(["info", str(folder)], monkeypatch) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("weights fit"))
    assert line.removeprefix("weights fit").strip().startswith(verdict)


@pytest.mark.parametrize("bits", [3, 16, "int3"])
def test_bits_that_are_not_supported_leave_the_model_as_it_is(bits: Any) -> None:
    model = load_chatglm()
    with pytest.raises(gmask.GmaskError, match=f"4 or 8 bits, not in {bits}$"):
        model.quantize(bits)
    assert isinstance(model.transformer.layers[0].mlp.dense_h_to_4h, torch.nn.Linear)


@pytest.mark.parametrize("bits", [3, 16])
def test_the_command_refuses_bits_that_are_not_supported(bits: int, tmp_path: Path, monkeypatch, capsys) -> None:
    publish(tmp_path / "chatglm-6b")
    arguments = ["quantize", str(tmp_path / "chatglm-6b"), str(tmp_path / "quantized"), "--bits", str(bits)]
    assert type_command(arguments, monkeypatch) == 2
    assert capsys.readouterr().err == f"gmask: weights can be kept in 4 or 8 bits, not in {bits}\n"
    arguments[-1] = "int3"
    assert type_command(arguments, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gmask: ") and "'--bits'" in line and line.endswith("; see gmask quantize --help")
    assert not (tmp_path / "quantized").exists()


def test_a_tokenizer_of_the_other_revision_is_refused_by_the_model_that_is_asked() -> None:
    """The Auto classes read the two apart; gmask.load compares them."""
    first = ChatGLMTokenizerV0(str(FIRST_VOCABULARY))
    model = load_chatglm()
    for ask in (model.chat, lambda *question: next(model.stream_chat(*question))):
        with pytest.raises(gmask.GmaskError, match=r"<sop> is 20516 to the tokenizer, but 516 to the model.* one$"):
            ask(first, "你好")
