"""How does a text with blanks become the context that a GLM reads, and how do the answers go back into the text?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.infilling.blanks import BlankTokens

BLANKS = ("[MASK]", "[sMASK]", "[gMASK]")


@dataclass(frozen=True, slots=True)
class Context:
    """What the model reads in both directions."""

    ids: tuple[int, ...]
    places: tuple[int, ...]  # of the blanks among the ids, ascending


@dataclass(frozen=True, slots=True)
class SplicedText:
    """A text with its blanks filled."""

    text: str
    answers: tuple[str, ...]  # as they stand in the text
    spans: tuple[tuple[int, int], ...]  # [start, end) of each answer in the text


@dataclass(frozen=True, slots=True)
class BlankedText:
    """A text cut at its blanks."""

    pieces: tuple[str, ...]  # what stands before, between and behind the blanks, escapes undone
    context: Context

    def swallowed_space(self, blank: int) -> str:
        """The white space that the blank's token takes from the text before it; the answer brings its own."""
        piece = self.pieces[blank]
        return piece[len(piece.rstrip()) :]

    def fit_answer(self, answer: str, blank: int) -> str:
        """An answer as it stands in the text.

        The user's text is never altered: where it has white space before the blank, or begins with the blank, the
        answer's own leading space goes; where white space follows, its trailing space goes.
        """
        space = self.swallowed_space(blank)
        if "\n" in space:
            answer = answer.lstrip()
        elif space or (blank == 0 and not self.pieces[0]):
            answer = answer.lstrip(" ")
        return answer.rstrip(" ") if self.pieces[blank + 1][:1].isspace() else answer

    def splice(self, answers: Sequence[str]) -> SplicedText:
        """The text with an answer in the place of each blank."""
        fitted = tuple(self.fit_answer(answer, blank) for blank, answer in enumerate(answers))
        text, spans = self.pieces[0], []
        for answer, piece in zip(fitted, self.pieces[1:], strict=True):
            spans.append((len(text), len(text) + len(answer)))
            text += answer + piece
        return SplicedText(text, fitted, tuple(spans))


def find_blank_tokens(tokenizer: PreTrainedTokenizerBase) -> BlankTokens:
    """The special ids of a tokenizer.

    Raises:
        GmaskError: it is not a GLM's.
    """
    try:
        return BlankTokens(
            mask=tokenizer.mask_token_id,
            smask=tokenizer.smask_token_id,
            gmask=tokenizer.gmask_token_id,
            sop=tokenizer.sop_token_id,
            eop=tokenizer.eop_token_id,
            pad=tokenizer.pad_token_id,
            cls=tokenizer.cls_token_id,
            eos=tokenizer.eos_token_id,
        )
    except AttributeError as error:
        raise GmaskError(f"the tokenizer is not a GLM's: {error}") from error


class TextReader:
    """Reads texts with blanks by the vocabulary of one tokenizer.

    ``\\[MASK]`` is the text "[MASK]" and no blank; so with every special token. Two backslashes are a backslash before
    a blank.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special = find_blank_tokens(tokenizer)
        self.special_ids = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        spellings = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
        self.pattern = re.compile(rf"(\\*)({spellings}|\[(?i:[a-z]*mask)\])")

    def read(self, text: str) -> BlankedText:
        """Cuts a text at its blanks and encodes it as ``[CLS] text <|endoftext|>``.

        As published, the white space before a blank is left to the answer, and a text that ends with ``[gMASK]`` is
        open: it has no ``<|endoftext|>``.

        Raises:
            GmaskError: no blank, or another special token that is not escaped.
        """
        pieces, blanks, end = [""], [], 0
        for match in self.pattern.finditer(text):
            slashes, token = match.groups()
            pieces[-1] += text[end : match.start()] + "\\" * (len(slashes) // 2)
            end = match.end()
            if len(slashes) % 2:
                pieces[-1] += token
            elif token in BLANKS and token in self.special_ids:
                blanks.append(self.special_ids[token])
                pieces.append("")
            else:
                kind = "holds the special token" if token in self.special_ids else "holds the unknown special token"
                raise GmaskError(
                    f"the text {kind} {token}: blanks are {', '.join(BLANKS)}; write \\{token} if it is meant as text"
                )
        pieces[-1] += text[end:]
        if not blanks:
            raise GmaskError(
                f"the text has no blank: put {BLANKS[0]}, {BLANKS[1]} or {BLANKS[2]} where words are missing"
            )
        return BlankedText(tuple(pieces), self._encode(pieces, blanks))

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are text like any other."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _encode(self, pieces: Sequence[str], blanks: Sequence[int]) -> Context:
        ids, places = [self.special.cls], []
        for piece, blank in zip(pieces, blanks, strict=False):
            ids += self.encode_plain(piece.rstrip())
            places.append(len(ids))
            ids.append(blank)
        ids += self.encode_plain(pieces[-1])
        if ids[-1] != self.special.gmask:
            ids.append(self.special.eos)
        return Context(tuple(ids), tuple(places))
