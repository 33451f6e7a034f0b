"""The vocabularies of ChatGLM-6B, today's and the first published one: text to ids and back.

White space is spelt in pieces of its own before SentencePiece, which would lose it, reads the text. Special tokens
are the six of the prompt format; ``[gMASK]``, ``[sMASK]``, ``</s>``, ``<ENC>`` and ``<dBLOCK>`` in a text are text.

The first published vocabulary begins with 20000 image tokens, so the id of a piece is its index plus 20000. Its file
holds ordinary pieces only. Special pieces and those of white space and bytes follow them, in the order of the later
vocabulary.

Source: published tokenization_chatglm.py, revision of the 130528-entry vocabulary.
Source: published tokenization_chatglm.py of March 2023 and the icetk package that it used.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import PreTrainedTokenizer

from gmask.architectures import LATER_CHATGLM
from gmask.errors import GmaskError
from gmask.files import refuse_placeholder

VOCABULARY_FILE = "ice_text.model"
LINE_END = "<n>"
LONGEST_SPACES = 80
"""The most spaces of one piece; there are pieces from two spaces on."""

SPACES = re.compile(f" {{2,{LONGEST_SPACES}}}")
WHITE_PIECES = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>")


def spell_white_space(text: str) -> str:
    """Replaces line ends, tabs and runs of spaces by their pieces, the longest first."""
    text = text.replace("\n", LINE_END).replace("\t", "<|tab|>")
    return SPACES.sub(lambda run: f"<|blank_{len(run[0])}|>", text)


def restore_white_space(text: str) -> str:
    """Replaces the pieces of white space by what they spell."""
    fixed = {LINE_END: "\n", "<|tab|>": "\t"}
    return WHITE_PIECES.sub(lambda piece: fixed.get(piece[0]) or " " * int(piece[1]), text)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """The published tokenizer of ChatGLM-6B; a prompt ends with ``[gMASK] <sop>``, an answer with ``<eop>``.

    Padding goes to the left. The attention mask is ``[B, S]``, 1 at tokens; the model derives layout and visibility
    from it. The published code made a mask ``[B, 1, S, S]`` and positions here, and the positions by another rule than
    the model's: a ``[MASK]`` in the text took precedence over the ``[gMASK]`` at its end. Decoding gives the text as
    the model wrote it; with ``clean_up_tokenization_spaces=True``, as published, spaces before punctuation are lost.

    Published folders use this name for both vocabularies. The file of the first one, which has no ``<sop>``, makes a
    `ChatGLMTokenizerV0`.

    Args:
        vocab_file: the published ``ice_text.model``.

    Raises:
        GmaskError: no such file, or not a SentencePiece model.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __new__(cls, vocab_file: str | None = None, *args: Any, **kwargs: Any) -> Self:
        if vocab_file is None or not Path(vocab_file).is_file() or b"\x05<sop>" in Path(vocab_file).read_bytes():
            made: Self = super().__new__(cls)
            return made

        made = super().__new__(ChatGLMTokenizerV0 if issubclass(ChatGLMTokenizerV0, cls) else cls)
        return made

    def __init__(
        self,
        vocab_file: str | None = None,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        padding_side: str = "left",
        do_lower_case: bool = False,
        remove_space: bool = False,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            source = kwargs.get("name_or_path", "the folder")
            raise GmaskError(
                f"{source}: lacks {VOCABULARY_FILE}, the vocabulary of ChatGLM-6B: copy it there; if it is "
                f"{LATER_CHATGLM.name}, {LATER_CHATGLM.remedy}"
            )
        self.vocab_file = str(vocab_file)
        self.pieces = self.read_vocabulary(self.vocab_file)
        self.do_lower_case, self.remove_space = do_lower_case, remove_space
        special = dict(bos_token=bos_token, eos_token=eos_token, mask_token=mask_token, pad_token=pad_token)
        special = {role: str(token) for role, token in {**special, "unk_token": unk_token}.items()}
        self._added_tokens_decoder = {
            self._convert_token_to_id(token): AddedToken(
                token, lstrip=True, rstrip=True, normalized=False, special=True
            )
            for token in special.values()
        }
        for ours in ("num_image_tokens", "auto_map", "added_tokens_decoder", "model_specific_special_tokens"):
            kwargs.pop(ours, None)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            **special, padding_side=padding_side, do_lower_case=do_lower_case, remove_space=remove_space, **kwargs
        )
        # The base class would make them special in texts.
        self.end_token, self.gmask_token = str(end_token), str(gmask_token)
        self.init_kwargs |= {"end_token": self.end_token, "gmask_token": self.gmask_token}

    @staticmethod
    def read_vocabulary(path: str) -> SentencePieceProcessor:
        """Reads the pieces of a vocabulary file."""
        return read_pieces(path)

    @property
    def first_id(self) -> int:
        """The id of the first piece."""
        return 0

    @property
    def vocab_size(self) -> int:
        size: int = self.pieces.vocab_size()
        return size

    @property
    def gmask_token_id(self) -> int:
        return self._convert_token_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        return self._convert_token_to_id(self.end_token)

    def get_vocab(self) -> dict[str, int]:
        """The pieces with their ids."""
        count = self.pieces.vocab_size()
        return {self.pieces.id_to_piece(index): self.first_id + index for index in range(count)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        tokens: list[str] = self.pieces.encode(spell_white_space(text), out_type=str)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.first_id + int(self.pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.pieces.id_to_piece(index - self.first_id)) if self._has_piece(index) else ""

    def _has_piece(self, index: int) -> bool:
        return self.first_id <= index < self.vocab_size

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of ids; control pieces and unknown ids spell nothing."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        silent = {self.pad_token_id, *(self.all_special_ids if skip_special_tokens else ())}
        pieces = [index - self.first_id for index in ids if index not in silent and self._has_piece(index)]
        text = restore_white_space(self.pieces.decode(pieces))
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return restore_white_space(self.pieces.decode(tokens))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``A [gMASK] <sop>``, with an answer ``A [gMASK] <sop> B <eop>``."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of tokens that `build_inputs_with_special_tokens` adds."""
        return 3 if pair else 2

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros: the model has no segments."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies the SentencePiece model."""
        target = Path(save_directory) / "-".join(filter(None, (filename_prefix, VOCABULARY_FILE)))
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def read_pieces(path: str) -> SentencePieceProcessor:
    """Reads the pieces of a vocabulary file.

    Raises:
        GmaskError: no such file, not a SentencePiece model, or that of another model.
    """
    if not Path(path).is_file():
        raise GmaskError(f"{path}: no such file; ChatGLM-6B needs the {VOCABULARY_FILE} that was published with it")
    try:
        pieces = SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        refuse_placeholder(Path(path))
        raise GmaskError(f"{path}: not a SentencePiece model; download it again") from error
    if pieces.piece_to_id(LINE_END) == pieces.unk_id():
        raise GmaskError(
            f"{path}: not the vocabulary of ChatGLM-6B, {VOCABULARY_FILE}, but that of another model; if it is "
            f"{LATER_CHATGLM.name}, {LATER_CHATGLM.remedy}"
        )
    return pieces


IMAGE_TOKENS = 20000
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # types of a piece in SentencePiece's format
APPENDED = (
    *((piece, CONTROL) for piece in ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>")),
    ("<dBLOCK>", CONTROL),
    ("<|tab|>", USER_DEFINED),
    *((f"<|blank_{length}|>", USER_DEFINED) for length in range(2, LONGEST_SPACES + 1)),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
)
"""The pieces that the vocabulary file lacks, with their types, in the order of their ids."""


class ChatGLMTokenizerV0(ChatGLMTokenizer):
    """The tokenizer of the 150528-entry vocabulary.

    A prompt ends with ``[gMASK] <sop>``, or with ``</s> <sop>`` if it holds a ``[MASK]`` that is not its last token.
    Padding goes to the right, as published.
    """

    def __init__(
        self,
        vocab_file: str | None = None,
        eos_token: str = "</s>",
        end_token: str = "<eop>",
        padding_side: str = "right",
        num_image_tokens: int = IMAGE_TOKENS,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        end_token = kwargs.pop("eop_token", end_token)  # as the folders of that time call it
        super().__init__(vocab_file, eos_token=eos_token, end_token=end_token, padding_side=padding_side, **kwargs)
        self.init_kwargs["num_image_tokens"] = num_image_tokens

    @property
    def vocab_size(self) -> int:
        return self.num_image_tokens + super().vocab_size

    @property
    def first_id(self) -> int:
        return self.num_image_tokens

    @staticmethod
    def read_vocabulary(path: str) -> SentencePieceProcessor:
        """Reads the pieces of a vocabulary file, and adds those that it lacks.

        Raises:
            GmaskError: no such file, or not a SentencePiece model.
        """
        read_pieces(path)
        return SentencePieceProcessor(model_proto=append_pieces(Path(path).read_bytes()))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``A [gMASK] <sop>``; if the prompt has a mask, ``A </s> <sop>``, or ``A <sop>`` if the mask is last."""
        masks = {self.mask_token_id, self.gmask_token_id}
        prompt = list(token_ids_0)
        if not masks & set(prompt):
            prompt.append(self.gmask_token_id)
        if prompt[-1] not in masks:
            prompt.append(self.eos_token_id)
        prompt.append(self.bos_token_id)
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.end_token_id]


def append_pieces(model: bytes) -> bytes:
    """Adds `APPENDED` to the pieces of a serialized SentencePiece model, and lets it read unknown characters as bytes.

    In the protocol-buffer format, further values of a repeated field are appended, and a second message is merged with
    the first, so the new fields are written behind the model.
    """
    pieces = b"".join(_field(1, _field(1, piece.encode()) + b"\x18" + bytes([kind])) for piece, kind in APPENDED)
    byte_fallback = _field(2, b"\x98\x02\x01")  # trainer_spec.byte_fallback, field 35, true
    return model + pieces + byte_fallback


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field; all of ours are shorter than 128 bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content
