"""The published vocabularies of GLM: text to ids and back.

Three classes use the `tokenizers` library. `GLMChineseTokenizer` uses sentencepiece, for two reasons. It is faster
here: a text is one word to it, so the cache of words in `tokenizers` finds nothing. And the normalizer of `tokenizers`
loses characters: it looks up whole graphemes, such as a letter with two accents, which its table may lack.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from gmask.errors import GmaskError
from gmask.files import read_object, read_text, refuse_placeholder, write_json
from gmask.tokenizers.glm_build_inputs import BlankFilling
from gmask.tokenizers.special_tokens import (
    COMMANDS,
    PUBLISHED_TOKENS,
    ROLES,
    SPACING_RULES,
    TRAINING_TOKENS,
    AddedIds,
    Cutter,
    Sides,
    Spacing,
    copy_vocabulary_file,
)

ADDED_TOKENS = "added_tokens.json"
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip")
"""What an `AddedToken` may ask for, beside being special; none is ever changed like a text to be found in it."""


class PublishedVocabulary(BlankFilling):
    """The base of the published vocabularies: special tokens in a table, and the white space beside them.

    Several spellings may have one id, which neither backend allows: in GLM-10B-Chinese ``[gMASK]`` and
    ``<|endofpiece|>`` share an id, and the training code calls RoBERTa's ``<s>`` ``[CLS]``.
    """

    # transformers' own
    all_special_ids: list[int]
    all_special_tokens: list[str]
    _extra_special_tokens: list[str]
    init_kwargs: dict[str, Any]
    clean_up_tokenization_spaces: bool
    split_special_tokens: bool
    vocab_files_names: ClassVar[dict[str, str]]
    clean_up_tokenization: Callable[[str], str]

    kind: ClassVar[str]
    takes_pairs: ClassVar[bool] = True
    padding_side = "right"
    model_input_names: ClassVar[list[str]] = ["input_ids", "position_ids", "attention_mask"]

    def _read_special_tokens(
        self,
        pieces: Mapping[str, int],
        added_ids_file: str | None,
        added_ids: AddedIds | None,
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """Fills the table of special tokens, and returns the settings for transformers.

        Args:
            pieces: ids of the vocabulary file.
            added_ids_file: has the ids of special tokens, unless ``added_ids`` are given; by default the published ids.
        """
        spacing: Spacing = settings.setdefault("spacing", "published")
        if (self.kind, spacing) not in SPACING_RULES:
            raise GmaskError(f"spacing {spacing!r} is neither published nor training")
        self.spacing, self.rule = spacing, SPACING_RULES[self.kind, spacing]
        self.token_flags = _read_flags(settings.get("token_flags"))
        self._vocab_size = 1 + max(pieces.values())
        published = PUBLISHED_TOKENS if spacing == "published" else TRAINING_TOKENS
        defaults = published[self.kind] if added_ids is None else added_ids
        table = {token: pieces[entry] for token, entry in defaults.items() if isinstance(entry, str)}
        if added_ids is None and added_ids_file is not None and os.path.isfile(added_ids_file):
            table |= read_ids(added_ids_file)
        else:
            table |= {token: self._vocab_size + entry for token, entry in defaults.items() if isinstance(entry, int)}
        for name in ("added_tokens_decoder", "auto_map", "use_fast", "tokenizer_file", "backend", "is_local"):
            settings.pop(name, None)
        settings = {**ROLES[self.kind, spacing], "clean_up_tokenization_spaces": self.rule.cleans_up} | settings
        roles = [str(settings[role]) for role in ROLES[self.kind, spacing] if settings.get(role) is not None]
        for token in (token for token in roles if token not in table):  # a role that a user gave another token
            table[token] = pieces.get(token, max(self._vocab_size, 1 + max(table.values())))
        extra: Any = settings.pop("additional_special_tokens", settings.get("extra_special_tokens")) or ()
        named = {str(value) for key, value in settings.items() if key.endswith("_token")}
        extra = [*map(str, extra), *(token for token in table if token in COMMANDS)]
        settings["extra_special_tokens"] = [token for token in dict.fromkeys(extra) if token not in named]
        self._added_ids, self._ordinary = table, table.keys() - named - set(extra)
        return settings

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Adds the tokens that the table does not have, behind all others.

        They remove white space on the sides of the spacing rule, and where an `AddedToken` asks for it. What else one
        asks for is saved as ``token_flags``, for the published table has names and ids alone.
        """
        new = []
        for token in new_tokens:
            is_special = special_tokens or (isinstance(token, AddedToken) and token.special)
            if not str(token) or str(token) in self._added_ids:
                continue
            if is_special and str(token) not in self.all_special_tokens:
                self._extra_special_tokens.append(str(token))
            if isinstance(token, AddedToken) and (flags := [flag for flag in TOKEN_FLAGS if getattr(token, flag)]):
                self.token_flags[str(token)] = flags
                self.init_kwargs["token_flags"] = self.token_flags
            new.append(self._as_added(str(token), is_special=is_special))
        return self._append_tokens(new)

    def _append_tokens(self, tokens: list[AddedToken]) -> int:
        """Gives new tokens their ids; returns how many were not known."""
        raise NotImplementedError

    def _as_added(self, token: str, *, is_special: bool) -> AddedToken:
        sides: Sides = self.rule.sides_of(token)
        flags = self.token_flags.get(token, ())
        return AddedToken(
            token,
            single_word="single_word" in flags,
            lstrip=sides.left or "lstrip" in flags,
            rstrip=sides.right or "rstrip" in flags,
            normalized=False,
            special=is_special,
        )

    def _table_tokens(self) -> dict[int, AddedToken]:
        """The tokens of the table by id; of several names for an id, the last."""
        return {
            index: self._as_added(token, is_special=token not in self._ordinary)
            for token, index in self._added_ids.items()
        }

    @property
    def vocab_size(self) -> int:
        """The number of entries in the vocabulary file."""
        return self._vocab_size

    def __len__(self) -> int:
        return max(self._vocab_size, 1 + max(self.get_added_vocab().values()))

    def _prepare_text(self, text: str, *, has_special_tokens: bool) -> str | list[int]:
        """The text that the backend encodes, or its ids.

        By the training rule a text of white space alone has no tokens. This does not hold for a piece of a text, which
        is encoded without special tokens.
        """
        return "" if has_special_tokens and self.rule.drops_blank_texts and not text.strip() else text

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        if kwargs.get("is_split_into_words") or _is_ids(text):  # transformers' own second call, or words
            return super()._encode_plus(text=text, text_pair=text_pair, **kwargs)  # type: ignore[misc]
        batch = text if isinstance(text, list | tuple) else ()
        is_pair = text_pair is not None or any(isinstance(one, list | tuple) and not _is_ids(one) for one in batch)
        if is_pair and not self.takes_pairs:
            raise GmaskError("this vocabulary has no form for pairs of texts: join the two into one text")
        split_special_tokens = kwargs.get("split_special_tokens")
        is_plain = self.split_special_tokens if split_special_tokens is None else split_special_tokens

        def prepare(value: Any) -> Any:
            if isinstance(value, list | tuple) and not _is_ids(value):
                return type(value)(map(prepare, value))
            return self._prepare_text(value, has_special_tokens=not is_plain) if isinstance(value, str) else value

        return super()._encode_plus(  # type: ignore[misc]
            text=prepare(text), text_pair=prepare(text_pair), **kwargs
        )

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of ids. What is between special tokens is decoded for itself; unknown ids are left out."""
        separate = {token_id: token for token, token_id in self.get_added_vocab().items()}  # of two names, the last
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        if not self.rule.separates_all:
            separate = {token_id: token for token_id, token in separate.items() if token_id >= self._vocab_size}
        parts: list[str] = []
        piece: list[int] = []
        for token_id in [token_ids] if isinstance(token_ids, int) else token_ids:
            if token_id in skipped:
                continue
            if token_id in separate:
                parts += [self._decode_piece(piece), separate[token_id]] if piece else [separate[token_id]]
                piece = []
            elif 0 <= token_id < self._vocab_size:
                piece.append(token_id)
        parts += [self._decode_piece(piece)] if piece else []
        text = self.rule.separator.join(parts)
        cleans_up = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if cleans_up else text

    def _decode_piece(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _save_pretrained(
        self, save_directory: str | os.PathLike[str], file_names: tuple[str, ...], **kwargs: Any
    ) -> tuple[str, ...]:
        """Writes the published files of the vocabulary, and the ids of all added tokens."""
        prefix = kwargs.get("filename_prefix")
        path = Path(save_directory, f"{prefix}-{ADDED_TOKENS}" if prefix else ADDED_TOKENS)
        table = dict(sorted(self.get_added_vocab().items(), key=lambda item: item[1]))
        write_json(path, table, indent=2)
        return *file_names, str(path), *self.save_vocabulary(str(save_directory), prefix)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies the vocabulary files."""
        saved = []
        for key, name in self.vocab_files_names.items():
            if name == ADDED_TOKENS:
                continue
            source, target = (
                Path(getattr(self, key)),
                Path(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name),
            )
            copy_vocabulary_file(source, target)
            saved.append(str(target))
        return tuple(saved)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], int)


def _read_flags(values: Any) -> dict[str, list[str]]:
    """The flags of added tokens, by token; whatever else a file has there is none."""
    named = values.items() if isinstance(values, dict) else ()
    return {
        str(token): [flag for flag in TOKEN_FLAGS if flag in flags] for token, flags in named if isinstance(flags, list)
    }


def check_file(path: str | None, tokenizer: Any, key: str, settings: Mapping[str, Any]) -> str:
    """Returns the path of a vocabulary file.

    Args:
        key: of the tokenizer's ``vocab_files_names``.

    Raises:
        GmaskError: there is no such file, or a Git LFS pointer in its place.
    """
    if path is None or not os.path.isfile(path):
        expected = path or os.path.join(str(settings.get("name_or_path") or "."), tokenizer.vocab_files_names[key])
        raise GmaskError(f"{expected}: missing; {type(tokenizer).__name__} needs it, so download or copy it there")
    refuse_placeholder(Path(path))
    return path


def read_ids(path: str) -> dict[str, int]:
    """Reads a JSON object of tokens and their ids."""
    values = read_object(Path(path))
    if not values or not all(type(value) is int and value >= 0 for value in values.values()):
        raise GmaskError(f"{path}: expected a JSON object of tokens and their ids")
    return values


class GLMTokenizer(BlankFilling, TokenizersBackend):
    """The tokenizer of a ``tokenizer.json`` that has the tokens of a GLM, such as those of our own models."""

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Returns how many the vocabulary did not have; the library counts those that it had, too."""
        before = len(self)
        super()._add_tokens(new_tokens, special_tokens)
        return len(self) - before


class GLMChineseTokenizer(PublishedVocabulary, PreTrainedTokenizer):
    """The SentencePiece vocabulary of GLM-Large-Chinese and GLM-10B-Chinese.

    Args:
        vocab_file: ``cog-pretrain.model``.
        added_ids_file: ``added_tokens.json``, the ids of special tokens.
        added_ids: a table of `TRAINING_TOKENS`, in place of that file.
        spacing: ``"published"``, as the Hugging Face code (white space on both sides of a special token is dropped),
            or ``"training"``, as the code of the training (only before masks).

    Source: tokenization_glm.py of THUDM/glm-large-chinese; THUDM/GLM data_utils/tokenization.py.
    """

    kind = "chinese"
    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "cog-pretrain.model",
        "added_ids_file": ADDED_TOKENS,
    }

    def __init__(
        self,
        vocab_file: str | None = None,
        added_ids_file: str | None = None,
        added_ids: AddedIds | None = None,
        **settings: Any,
    ) -> None:
        self.vocab_file = check_file(vocab_file, self, "vocab_file", settings)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
        except RuntimeError as error:
            raise GmaskError(f"{self.vocab_file}: not a SentencePiece model; download or copy it again") from error
        pieces = self.model.id_to_piece(list(range(self.model.vocab_size())))
        self._piece_ids = {piece: index for index, piece in enumerate(pieces)}
        settings = self._read_special_tokens(self._piece_ids, added_ids_file, added_ids, settings)
        self._added_tokens_decoder = self._table_tokens()
        super().__init__(**settings)
        self._added_tokens_encoder: dict[str, int] = self._added_ids | self._added_tokens_encoder
        self._update_trie()

    def get_vocab(self) -> dict[str, int]:
        return self._piece_ids | self._added_tokens_encoder

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return dict(self._added_tokens_encoder)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``[CLS] A <|endoftext|>``, or ``[CLS] A [SEP] B <|endoftext|>``."""
        pair = [] if token_ids_1 is None else [self.sep_token_id, *token_ids_1]
        return [self.cls_token_id, *token_ids_0, *pair, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, None, already_has_special_tokens=True)  # type: ignore[no-any-return]
        pair = [] if token_ids_1 is None else [1, *[0] * len(token_ids_1)]
        return [1, *[0] * len(token_ids_0), *pair, 1]

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The pieces of a text; what is between added tokens is encoded as a text of its own."""
        is_plain = kwargs.pop("split_special_tokens", self.split_special_tokens)
        tokens: list[str] = []
        for part, is_token in (self._plain_cutter if is_plain else self._cutter).cut(text):
            tokens += [part] if is_token else self._tokenize(part)
        return tokens

    def _prepare_text(self, text: str, *, has_special_tokens: bool) -> str | list[int]:
        """The ids of a text, which transformers would otherwise look up piece by piece."""
        text = str(super()._prepare_text(text, has_special_tokens=has_special_tokens))
        ids: list[int] = []
        for part, is_token in (self._cutter if has_special_tokens else self._plain_cutter).cut(text):
            ids += [self._added_tokens_encoder[part]] if is_token else self.model.encode(part)
        return ids or ""  # transformers takes no empty list of ids

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        added, pieces, unknown = self._added_tokens_encoder, self._piece_ids, self.model.unk_id()
        ids: list[int] = [
            added[token] if token in added else pieces.get(token, unknown)
            for token in ([tokens] if isinstance(tokens, str) else tokens)
        ]
        return ids[0] if isinstance(tokens, str) else ids

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text: str = self.model.decode(list(tokens))
        return text

    def _append_tokens(self, tokens: list[AddedToken]) -> int:
        before = len(self)
        for token in tokens:
            if token.content not in self._added_tokens_encoder:
                index = self._piece_ids.get(token.content, len(self))
                self._added_tokens_decoder[index] = token
                self._added_tokens_encoder[token.content] = index
        self._update_trie()
        return len(self) - before

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        tokens = {token: self._as_added(token, is_special=token not in self._ordinary) for token in self._added_ids}
        tokens |= {token.content: token for token in self._added_tokens_decoder.values()}
        self._cutter = Cutter(tokens)
        self._plain_cutter = Cutter({name: token for name, token in tokens.items() if not token.special})

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        pieces: list[str] = self.model.encode(text, out_type=str)
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self._piece_ids.get(token, self.model.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.model.id_to_piece(index)) if 0 <= index < self._vocab_size else ""

    def _decode_piece(self, ids: list[int]) -> str:
        text: str = self.model.decode(ids)
        return text


class PublishedBackend(PublishedVocabulary, TokenizersBackend):
    """A published vocabulary on the `tokenizers` library; arguments as of `GLMChineseTokenizer`."""

    pair_template: ClassVar[str | None] = None
    single_template: ClassVar[str]
    _template_roles: Mapping[str, str] = MappingProxyType({})
    _special_tokens_map: Mapping[str, Any]  # transformers' own

    def __init__(
        self,
        vocab_file: str | None = None,
        merges_file: str | None = None,
        added_ids_file: str | None = None,
        added_ids: AddedIds | None = None,
        **settings: Any,
    ) -> None:
        self.vocab_file = check_file(vocab_file, self, "vocab_file", settings)
        if "merges_file" in self.vocab_files_names:
            self.merges_file = check_file(merges_file, self, "merges_file", settings)
        pieces = self._read_pieces()
        settings = self._read_special_tokens(pieces, added_ids_file, added_ids, settings)
        # The backend has one name for each id.
        names = {index: token for token, index in self._added_ids.items()}
        self._second_names = {token: names[index] for token, index in self._added_ids.items() if names[index] != token}
        named = {names.get(index, piece): index for piece, index in pieces.items()}
        behind = sorted(index for index in names if index >= self._vocab_size)
        if behind != list(range(self._vocab_size, self._vocab_size + len(behind))):
            named |= {names[index]: index for index in behind}  # the backend numbers tokens without gaps
        # A word of a text must not be found among them, so they are not in the backend's own vocabulary.
        self._tokenizer = self._make_backend(named, settings)
        table = self._table_tokens()
        self._tokenizer.add_tokens([table[index] for index in sorted(table)])  # add_special_tokens makes all special
        super().__init__(**settings)
        self._set_template()

    def _set_template(self) -> None:
        """Puts the tokens that now have the roles around a text."""
        roles = {role: str(self._special_tokens_map[f"{role}_token"]) for role in ("cls", "sep", "eos")}
        if roles == self._template_roles:
            return
        self._template_roles = roles
        known = self.get_added_vocab()
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=self.single_template.format(**roles),
            pair=(self.pair_template or "$A $B:1").format(**roles),
            special_tokens=[(token, known[token]) for token in dict.fromkeys(roles.values())],
        )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Returns the arguments unchanged: the constructor reads the files."""
        return kwargs

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        raise GmaskError("a published vocabulary is what it is: train one of your own with gmask train-tokenizer")

    def get_vocab(self) -> dict[str, int]:
        return {**super().get_vocab(), **self._added_ids}  # with the second names

    def get_added_vocab(self) -> dict[str, int]:
        return self._added_ids | super().get_added_vocab()

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        index: int = (
            self._added_ids[token] if token in self._added_ids else super()._convert_token_to_id_with_added_voc(token)
        )
        return index

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        self._set_template()
        if text_pair != "" or not isinstance(text, str):
            return super()._encode_plus(text, text_pair, **kwargs)
        batch = super()._encode_plus([text], [text_pair], **kwargs)  # the base class takes "" for no second text
        if kwargs.get("return_tensors") or kwargs.get("return_overflowing_tokens"):
            return batch
        return BatchEncoding({key: values[0] for key, values in batch.items()}, batch.encodings)

    def _prepare_text(self, text: str, *, has_special_tokens: bool) -> str | list[int]:
        for token, name in self._second_names.items() if has_special_tokens else ():
            text = text.replace(token, name)
        return super()._prepare_text(text, has_special_tokens=has_special_tokens)

    def _append_tokens(self, tokens: list[AddedToken]) -> int:
        before = len(self)
        self._tokenizer.add_tokens(tokens)
        return len(self) - before

    def _decode_piece(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _read_pieces(self) -> dict[str, int]:
        return read_ids(self.vocab_file)

    def _make_backend(self, pieces: dict[str, int], settings: Mapping[str, Any]) -> Tokenizer:
        """Byte-level BPE of vocabulary and merges."""
        lines = read_text(self.merges_file).split("\n")
        merges = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#version")]
        try:
            tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=merges))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise GmaskError(f"{self.merges_file}: does not belong to {self.vocab_file} ({error})") from error
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer


class GLMGPT2Tokenizer(PublishedBackend):
    """The GPT-2 vocabulary of GLM-2B and GLM-10B; it takes no pairs of texts. See `GLMChineseTokenizer`."""

    kind = "gpt2"
    takes_pairs = False
    single_template = "{cls} $A {eos}"
    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "vocab.json",
        "merges_file": "merges.txt",
        "added_ids_file": ADDED_TOKENS,
    }


class GLMRobertaTokenizer(PublishedBackend):
    """The RoBERTa vocabulary of GLM-RoBERTa-Large. See `GLMChineseTokenizer`."""

    kind = "roberta"
    single_template = "{cls} $A {eos}"
    pair_template = "{cls} $A {sep} {sep} $B:1 {eos}:1"
    vocab_files_names = GLMGPT2Tokenizer.vocab_files_names


class GLMBertTokenizer(PublishedBackend):
    """The uncased BERT vocabulary of GLM-Base to GLM-515M. See `GLMChineseTokenizer`."""

    kind = "bert"
    single_template = "{cls} $A {sep}"
    pair_template = "{cls} $A {sep} $B:1 {sep}:1"
    continuation = "##"  # begins the pieces that continue a word
    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "vocab.txt", "added_ids_file": ADDED_TOKENS}

    def _read_pieces(self) -> dict[str, int]:
        lines = read_text(self.vocab_file).removesuffix("\n").split("\n")
        pieces = {line: index for index, line in enumerate(lines)}
        if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - pieces.keys():
            raise GmaskError(f"{self.vocab_file}: has no {', '.join(sorted(missing))}; it is not BERT's vocabulary")
        return pieces

    def _make_backend(self, pieces: dict[str, int], settings: Mapping[str, Any]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocab=pieces, unk_token="[UNK]", max_input_chars_per_word=100))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=settings.get("do_lower_case", True))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix=self.continuation, cleanup=False)
        return tokenizer
