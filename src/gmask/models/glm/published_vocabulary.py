"""What do the published vocabularies share: which tokens are special, and how does the text stand between them?"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken
from transformers import BatchEncoding

from gmask.errors import GmaskError
from gmask.models.glm.prompts import BlankFilling
from gmask.models.glm.special_tokens import (
    COMMANDS,
    PUBLISHED_TOKENS,
    ROLES,
    SPACING_RULES,
    TRAINING_TOKENS,
    Ids,
    Sides,
    Spacing,
)

ADDED_TOKENS = "added_tokens.json"


class PublishedVocabulary(BlankFilling):
    """What the published vocabularies share: special tokens in a table of their own, and the white space at them.

    Several spellings may have one id, which neither backend knows: GLM-10B-Chinese has one for ``[gMASK]`` and
    ``<|endofpiece|>``, and the training code calls RoBERTa's ``<s>`` ``[CLS]``.
    """

    # What comes from transformers
    all_special_ids: list[int]
    clean_up_tokenization_spaces: bool
    split_special_tokens: bool
    vocab_files_names: ClassVar[dict[str, str]]
    clean_up_tokenization: Callable[[str], str]

    kind: ClassVar[str]
    takes_pairs: ClassVar[bool] = True
    padding_side = "right"
    model_input_names: ClassVar[list[str]] = ["input_ids", "position_ids", "attention_mask"]

    def _read_special_tokens(
        self, pieces: Mapping[str, int], added_ids_file: str | None, added_ids: Ids | None, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Fills the table from the file, the given ids or the published ones; returns settings for transformers."""
        spacing: Spacing = settings.setdefault("spacing", "published")
        if (self.kind, spacing) not in SPACING_RULES:
            raise GmaskError(f"spacing {spacing!r} is neither published nor training")
        self.spacing, self.rule = spacing, SPACING_RULES[self.kind, spacing]
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
        extra: Any = settings.pop("additional_special_tokens", settings.get("extra_special_tokens")) or ()
        named = {str(value) for key, value in settings.items() if key.endswith("_token")}
        extra = [*map(str, extra), *(token for token in table if token in COMMANDS)]
        settings["extra_special_tokens"] = [token for token in dict.fromkeys(extra) if token not in named]
        self._added_ids, self._ordinary = table, table.keys() - named - set(extra)
        return settings

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Adds tokens behind the others, with the sides that the rule gives them; those of the table are there."""
        new = []
        for token in new_tokens:
            is_special = special_tokens or (isinstance(token, AddedToken) and token.special)
            if str(token) and str(token) not in self._added_ids:
                new.append(self._as_added(str(token), is_special=is_special))
        return self._append_tokens(new)

    def _append_tokens(self, tokens: list[AddedToken]) -> int:
        """Gives new tokens their ids; returns how many were not known."""
        raise NotImplementedError

    def _as_added(self, token: str, *, is_special: bool) -> AddedToken:
        sides: Sides = self.rule.sides_of(token)
        return AddedToken(token, lstrip=sides.left, rstrip=sides.right, normalized=False, special=is_special)

    def _table_tokens(self) -> dict[int, AddedToken]:
        """The tokens of the table by id; of several names of an id, the last."""
        return {
            index: self._as_added(token, is_special=token not in self._ordinary)
            for token, index in self._added_ids.items()
        }

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary file."""
        return self._vocab_size

    def __len__(self) -> int:
        return max(self._vocab_size, 1 + max(self.get_added_vocab().values()))

    def _prepare_text(self, text: str, *, has_special_tokens: bool) -> str | list[int]:
        """A text as the backend takes it, or its ids.

        Under the training rule, a text of white space alone is empty; but not the white space between special tokens,
        so neither is a text without them: it may be a piece of another.
        """
        return "" if has_special_tokens and self.rule.drops_blank_texts and not text.strip() else text

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        if kwargs.get("is_split_into_words") or _is_ids(text):  # nothing to prepare, or transformers' own second call
            return super()._encode_plus(text=text, text_pair=text_pair, **kwargs)  # type: ignore[misc]
        batch = text if isinstance(text, list | tuple) else ()
        is_pair = text_pair is not None or any(isinstance(row, list | tuple) and not _is_ids(row) for row in batch)
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
        """Decodes the text between special tokens piece by piece; ids that stand for nothing are left out."""
        apart = {token_id: token for token, token_id in self.get_added_vocab().items()}  # of two names, the last
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        if not self.rule.is_apart:
            apart = {token_id: token for token_id, token in apart.items() if token_id >= self._vocab_size}
        parts: list[str] = []
        piece: list[int] = []
        for token_id in [token_ids] if isinstance(token_ids, int) else token_ids:
            if token_id in skipped:
                continue
            if token_id in apart:
                parts += [self._decode_piece(piece), apart[token_id]] if piece else [apart[token_id]]
                piece = []
            elif 0 <= token_id < self._vocab_size:
                piece.append(token_id)
        parts += [self._decode_piece(piece)] if piece else []
        text = self.rule.joint.join(parts)
        cleans_up = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if cleans_up else text

    def _decode_piece(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _save_pretrained(
        self, save_directory: str | os.PathLike[str], file_names: tuple[str, ...], **kwargs: Any
    ) -> tuple[str, ...]:
        """Writes the vocabulary in its published files, and beside them the ids of all added tokens."""
        prefix = kwargs.get("filename_prefix")
        path = Path(save_directory, f"{prefix}-{ADDED_TOKENS}" if prefix else ADDED_TOKENS)
        table = dict(sorted(self.get_added_vocab().items(), key=lambda item: item[1]))
        path.write_text(json.dumps(table, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
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
            if source.resolve() != target.resolve():
                shutil.copyfile(source, target)
            saved.append(str(target))
        return tuple(saved)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], int)


def check_file(path: str | None, tokenizer: Any, key: str, settings: Mapping[str, Any]) -> str:
    """The path of a vocabulary file that must be there: ``key`` of the tokenizer's ``vocab_files_names``.

    Raises:
        GmaskError: it is not.
    """
    if path is None or not os.path.isfile(path):
        place = path or os.path.join(str(settings.get("name_or_path") or "."), tokenizer.vocab_files_names[key])
        raise GmaskError(f"{place}: missing; {type(tokenizer).__name__} needs it, so download or copy it there")
    return path


def read_ids(path: str) -> dict[str, int]:
    """A JSON object of tokens and their ids."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise GmaskError(f"{path}: not JSON; download or copy it again") from error
    if not isinstance(values, dict) or not values or not all(isinstance(value, int) for value in values.values()):
        raise GmaskError(f"{path}: expected a JSON object of tokens and their ids")
    return values
