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
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import PreTrainedTokenizer

from gmask.architectures import LATER_CHATGLM
from gmask.errors import GmaskError
from gmask.files import refuse_placeholder
from gmask.tokenizers.special_tokens import Cutter, copy_vocabulary_file

VOCABULARY_FILE = "ice_text.model"
LINE_END = "<n>"
LONGEST_SPACES = 80
"""The most spaces of one piece; there are pieces from two spaces on."""

PROMPT_TOKENS = ("[gMASK]", "<eop>")
"""Tokens of a conversation that are text to the published tokenizers, or to one of them."""

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
            if self._find_id(token) is not None
        }
        self._published_ids = frozenset(self._added_tokens_decoder)
        self._added_tokens_decoder |= self._read_added(kwargs.pop("added_tokens_decoder", {}))
        for ours in ("num_image_tokens", "auto_map", "model_specific_special_tokens"):
            kwargs.pop(ours, None)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            **special, padding_side=padding_side, do_lower_case=do_lower_case, remove_space=remove_space, **kwargs
        )
        # The base class would make them special in texts.
        self.end_token, self.gmask_token = str(end_token), str(gmask_token)
        self.init_kwargs |= {"end_token": self.end_token, "gmask_token": self.gmask_token}
        self._silence_prompt_tokens()

    def register_prompt_tokens(self) -> None:
        """Makes ``[gMASK]`` and ``<eop>`` special tokens in texts, with the ids that they have.

        To the published tokenizer ``[gMASK]`` is text there, and to that of the first vocabulary ``<eop>``, too.
        """
        tokens = [AddedToken(token, normalized=False, special=True) for token in PROMPT_TOKENS]
        self.add_tokens([token for token in tokens if self._find_id(token.content) is not None], special_tokens=True)
        self._silence_prompt_tokens()

    def _silence_prompt_tokens(self) -> None:
        """Lets registered tokens of the prompt spell nothing in decoded text, as other control pieces."""
        ids = {self._convert_token_to_id(token) for token in PROMPT_TOKENS}
        self._published_ids |= ids & self._added_tokens_decoder.keys()

    @staticmethod
    def read_vocabulary(path: str) -> SentencePieceProcessor:
        """Reads the pieces of a vocabulary file."""
        return read_pieces(path)

    def _read_added(self, saved: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
        """The tokens of a saved table that users added, by id.

        Raises:
            GmaskError: a token has the id of a piece, or that of none that the vocabulary could give it.
        """
        added = {index: token for index, token in saved.items() if index not in self._published_ids}
        for index, token in added.items():
            known = self._find_id(token.content)
            if index != known and (known is not None or not 0 <= index - self.vocab_size < len(saved)):
                raise GmaskError(
                    f"{self.vocab_file}: the added token {token.content!r:.40} beside it has the id {index}, which "
                    "this vocabulary does not give it; take all files of the tokenizer from one folder"
                )
        return added

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
        return int(self._convert_token_to_id_with_added_voc(self.gmask_token))

    @property
    def end_token_id(self) -> int:
        return int(self._convert_token_to_id_with_added_voc(self.end_token))

    def get_vocab(self) -> dict[str, int]:
        """The pieces and the added tokens with their ids."""
        pieces = self.pieces.id_to_piece(list(range(self.pieces.vocab_size())))
        vocabulary = {piece: self.first_id + index for index, piece in enumerate(pieces)}
        return {**vocabulary, **self._added_tokens_encoder}

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Adds the tokens that are not added yet, behind all others; they are found in a text as they are spelt."""
        new = [token if isinstance(token, AddedToken) else AddedToken(token) for token in new_tokens]
        added: int = super()._add_tokens(
            [
                AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                    special=token.special or special_tokens or token.content in self.all_special_tokens,
                )
                for token in new
                if token.content not in self._added_tokens_encoder
            ]
        )
        return added

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        tokens = {token.content: token for token in self._added_tokens_decoder.values()}
        self._cutter = Cutter(tokens)
        self._plain_cutter = Cutter({name: token for name, token in tokens.items() if not token.special})

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The pieces of a text, and the added tokens in it; with ``split_special_tokens`` special ones are text."""
        is_plain = kwargs.pop("split_special_tokens", self.split_special_tokens)
        tokens: list[str] = []
        for part, is_token in (self._plain_cutter if is_plain else self._cutter).cut(text):
            tokens += [part] if is_token else self._tokenize(part)
        return tokens

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        tokens: list[str] = self.pieces.encode(spell_white_space(text), out_type=str)
        return tokens

    def _find_id(self, token: str) -> int | None:
        """The id of a token that the vocabulary file has."""
        index = self._convert_token_to_id(token)
        return index if self._convert_id_to_token(index) == token else None

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
        """The text of ids; control pieces and unknown ids spell nothing, tokens that users added spell themselves."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        silent = {self.pad_token_id, *(self.all_special_ids if skip_special_tokens else ())}
        text = self._join([self._spelling(index) for index in ids if index not in silent])
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def _spelling(self, index: int) -> str | int | None:
        """What an id adds to a text: an added token, a piece (its index in the file), or nothing."""
        if index in self._added_tokens_decoder and index not in self._published_ids:
            return str(self._added_tokens_decoder[index].content)
        return index - self.first_id if self._has_piece(index) else None

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces and added tokens."""
        return self._join([self._spelling(self._convert_token_to_id_with_added_voc(token)) for token in tokens])

    def _join(self, spellings: Iterable[str | int | None]) -> str:
        """The text of pieces and added tokens; these have white space on both sides, as published."""
        parts: list[str] = []
        for kind, run in groupby((one for one in spellings if one is not None), key=type):
            if kind is str:
                parts += map(str, run)
            else:
                parts.append(restore_white_space(self.pieces.decode([index for index in run if type(index) is int])))
        text = ""
        for part in filter(None, parts):
            text += part if not text or text[-1].isspace() or part[0].isspace() else f" {part}"
        return text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``A [gMASK] <sop>``, with an answer ``A [gMASK] <sop> B <eop>``."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each token that `build_inputs_with_special_tokens` adds, 0 for the others."""
        if already_has_special_tokens:
            special = set(self.all_special_ids) | {self.gmask_token_id, self.end_token_id}
            return [int(index in special) for index in token_ids_0]
        added = len(self.build_inputs_with_special_tokens(token_ids_0)) - len(token_ids_0)
        answer = [] if token_ids_1 is None else [*[0] * len(token_ids_1), 1]
        return [*[0] * len(token_ids_0), *[1] * added, *answer]

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
        copy_vocabulary_file(Path(self.vocab_file), target)
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
IMAGE_TOKEN = re.compile(r"<image_(\d{1,9})>")
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

    def get_vocab(self) -> dict[str, int]:
        """The image tokens, the pieces and the added tokens with their ids."""
        return {f"<image_{index}>": index for index in range(self.first_id)} | super().get_vocab()

    def _convert_token_to_id(self, token: str) -> int:
        image = IMAGE_TOKEN.fullmatch(token)
        if image and int(image[1]) < self.first_id:
            return int(image[1])
        return super()._convert_token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return f"<image_{index}>" if 0 <= index < self.first_id else super()._convert_id_to_token(index)

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
