"""Are weights in the blocks of the CPU kernels mapped, the same bit for bit, and readable in every other way?"""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

import gmask
from conversions import assert_same, tensors_of
from gmask.checkpoints import tensor_files
from gmask.checkpoints.convert import convert, quantize_folder
from gmask.checkpoints.load import load_model
from gmask.checkpoints.tensor_files import BLOCK_ALIGNMENT, BLOCKS
from gmask.native import ops as native
from gmask.quantization.kernels import NATIVE_PATHS, PATH_VARIABLE
from gmask.quantization.quantizer import QuantizationConfig, quantized_layers

SHARED = Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the tiny vocabularies are not here")
needs_kernels = pytest.mark.skipif(not native.instruction_sets(), reason="the C++ library was not built")
FORMS = {
    "int4": QuantizationConfig(4),
    "int4-g32-embeddings": QuantizationConfig(4, 32, embeddings=True),
    "int8-embeddings": QuantizationConfig(8, embeddings=True),
}


@pytest.fixture(params=[(name, form) for name in ("hf-glm-tiny", "chatglm-tiny") for form in FORMS], ids="-".join)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of quantized weights, and the same to be mapped."""
    name, form = request.param
    plain, mapped = tmp_path / "plain", tmp_path / "mapped"
    quantize_folder(SHARED / name / "model", plain, FORMS[form])
    convert(plain, mapped, to="mapped")
    return plain, mapped


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    quantize_folder(SHARED / "hf-glm-tiny" / "model", tmp_path / "plain", FORMS["int4"])
    convert(tmp_path / "plain", tmp_path / "mapped", to="mapped")
    return tmp_path / "mapped"


def logits(model: Any) -> Tensor:
    ids = torch.tensor([[7, 8, 9, model.config.gmask_token_id, model.config.sop_token_id]])
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def products(model: Any) -> list[Any]:
    """What the layers multiply by, if it is there already."""
    packed = [getattr(layer._parameters["weight"], "packed", None) for _, layer in quantized_layers(model)]
    return [one and one.product for one in packed]


@needs_kernels
def test_the_model_is_the_same_and_its_weights_lie_in_the_file(folders: tuple[Path, Path]) -> None:
    plain, mapped = folders
    expected, model = load_model(plain, device="cpu"), load_model(mapped, device="cpu")
    assert torch.equal(logits(model), logits(expected))
    found = products(model)
    assert found and all(one.path in NATIVE_PATHS for one in found)
    first = found[0].data.data_ptr()
    assert first % BLOCK_ALIGNMENT == 0
    if Path("/proc/self/maps").exists():
        lines = [line for line in mapped_files().splitlines() if str(mapped) in line]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        for one in found:
            assert any(start <= one.data.data_ptr() < end for start, end in spans)
    state, wanted = model.state_dict(), expected.state_dict()  # in the published format again
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert torch.equal(logits(model.bfloat16()), logits(expected.bfloat16()))


def test_it_becomes_the_portable_form_again_and_any_path_reads_it(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mapped = folders
    convert(mapped, tmp_path / "back", to="gmask")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(plain))
    monkeypatch.setenv(PATH_VARIABLE, "torch")
    assert torch.equal(logits(load_model(mapped, device="cpu")), logits(load_model(plain, device="cpu")))


@needs_kernels
def test_saving_and_tuning_see_the_published_integers(mapped: Path, tmp_path: Path) -> None:
    plain = mapped.with_name("plain")
    model = load_model(mapped, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    assert_same(tensors_of(tmp_path / "saved"), tensors_of(plain))
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


def test_who_cannot_read_it_says_what_to_do(mapped: Path, tmp_path: Path) -> None:
    with pytest.raises(gmask.GmaskError, match=r"laid out for gmask's CPU kernels.*gmask convert \S+ NEW --to gmask"):
        AutoModelForSeq2SeqLM.from_pretrained(mapped)
    with pytest.raises(gmask.GmaskError, match="--to mapped is for int8 or int4 weights"):
        convert(SHARED / "hf-glm-tiny" / "model", tmp_path / "new", to="mapped")
    with pytest.raises(gmask.GmaskError, match="nothing to convert"):
        convert(mapped.with_name("plain"), tmp_path / "new", to="gmask")


def change_header(path: Path, change: Any) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    values = json.loads(header["__metadata__"][BLOCKS])
    header["__metadata__"][BLOCKS] = json.dumps(change(values))
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def other_shape(values: dict[str, Any]) -> dict[str, Any]:
    name = next(name for name in values["shapes"] if name.endswith(".weight"))
    return values | {"shapes": {**values["shapes"], name: [10**6, 8]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"layout": 0}, "for the kernels of another version of gmask"),
        (lambda values: values | {"bits": 3}, "3"),
        (lambda values: [], "its header is damaged"),
        (lambda values: {"layout": 1}, "its header is damaged"),
        (lambda values: values | {"shapes": {"no.such.weight": [32, 32]}}, "is not as its header says"),
        (lambda values: values | {"shapes": {"no.such.weight": "x"}}, "its header is damaged"),
        (other_shape, "is not as its header says"),
    ],
)
def test_a_header_that_lies_is_refused_in_one_line(mapped: Path, change: Any, message: str) -> None:
    change_header(mapped / "model.safetensors", change)
    with pytest.raises(gmask.GmaskError, match=re.escape(message)) as caught:
        load_model(mapped, device="cpu")
    assert "\n" not in str(caught.value)


def test_both_packings_write_the_same_file(mapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files.native, "instruction_sets", tuple)
    convert(mapped.with_name("plain"), tmp_path / "plainly", to="mapped")
    assert (tmp_path / "plainly/model.safetensors").read_bytes() == (mapped / "model.safetensors").read_bytes()
