"""How does text become the ids of the first published ChatGLM-6B, whose vocabulary begins with 20000 image tokens?

Its vocabulary file holds the ordinary pieces alone. The special ones, those of white space and those of bytes follow
them in the order of the later vocabulary, and every id is counted on by the image tokens.
Source: published tokenization_chatglm.py of March 2023 and the icetk package that it used.
"""

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from gmask.models.chatglm.tokenization import LONGEST_BLANK, ChatGLMTokenizer, read_pieces

IMAGE_TOKENS = 20000
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # types of a piece in SentencePiece's format

APPENDED = (
    *((piece, CONTROL) for piece in ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>")),
    ("<dBLOCK>", CONTROL),
    ("<|tab|>", USER_DEFINED),
    *((f"<|blank_{length}|>", USER_DEFINED) for length in range(2, LONGEST_BLANK + 1)),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
)
"""Pieces that the vocabulary file lacks, in the order of their ids."""


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
        """The pieces of the file and those that it lacks.

        Raises:
            GmaskError: no such file, or not a SentencePiece model.
        """
        read_pieces(path)
        return SentencePieceProcessor(model_proto=append_pieces(Path(path).read_bytes()))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``A [gMASK] <sop>``; behind a prompt with a mask of its own ``</s> <sop>``, or ``<sop>`` if it is last."""
        masks = {self.mask_token_id, self.gmask_token_id}
        prompt = list(token_ids_0)
        if not masks & set(prompt):
            prompt.append(self.gmask_token_id)
        if prompt[-1] not in masks:
            prompt.append(self.eos_token_id)
        prompt.append(self.bos_token_id)
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.end_token_id]


def append_pieces(model: bytes) -> bytes:
    """A serialized SentencePiece model with `APPENDED` behind its pieces, and unknown characters read as bytes.

    In the protocol-buffer format, a repeated field goes on and a single message is merged where it occurs again, so
    nothing has to be taken apart.
    """
    pieces = b"".join(_field(1, _field(1, piece.encode()) + b"\x18" + bytes([kind])) for piece, kind in APPENDED)
    byte_fallback = _field(2, b"\x98\x02\x01")  # trainer_spec.byte_fallback, field 35, true
    return model + pieces + byte_fallback


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field; all of ours are shorter than 128 bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content
