"""Which trained prefix does a folder of P-tuning hold, and does a model have room for it?

Source: published ``ptuning/trainer.py``, which saves the trained parameters alone.
"""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from gmask.checkpoints.fit import PREFIX
from gmask.checkpoints.reading import open_checkpoint
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig

TABLE = f"{PREFIX}embedding.weight"


def add_prefix(config: ChatGLMConfig, folder: Path) -> None:
    """Has a config describe a model with the prefix of a folder: its length, and whether a network computes it.

    Raises:
        GmaskError: the folder holds none, or more than one.
    """
    if (folder / "adapter_config.json").is_file():
        raise GmaskError(
            f"{folder}: is an adapter of PEFT: load the model alone, then peft.PeftModel.from_pretrained(model, FOLDER)"
        )
    with open_checkpoint(folder) as checkpoint:
        others = [key for key in checkpoint if not key.startswith(PREFIX)]
        if others or TABLE not in checkpoint:
            held = f"holds {others[0]}" if others else f"has no {TABLE}"
            raise GmaskError(f"{folder}: {held}, so it is not a P-tuning prefix, which adapter= asks for")
        config.pre_seq_len = checkpoint.shape(TABLE)[0]
        config.prefix_projection = f"{PREFIX}trans.0.weight" in checkpoint


def read_prefix(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a prefix by their names in a model, on the CPU, in the precision that they are stored in.

    Raises:
        GmaskError: they are not those of this model.
    """
    shapes = {key: value.shape for key, value in model.state_dict().items() if key.startswith(PREFIX)}
    with open_checkpoint(folder) as checkpoint:
        found = {key: checkpoint.shape(key) for key in checkpoint}
        if found != shapes:
            key = min(key for key in found.keys() | shapes.keys() if found.get(key) != shapes.get(key))
            stored, wanted = (list(shape) if shape else "absent" for shape in (found.get(key), shapes.get(key)))
            raise GmaskError(f"{folder}: {key} is {stored}, but {wanted} for this model: it was trained for another")
        return {key: checkpoint.read(key).clone() for key in found}
