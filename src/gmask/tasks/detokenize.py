"""Texts out of the tokens of published data sets, whose punctuation stands apart."""

import re

WIKITEXT_SIGNS = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
WIKITEXT_PAIRS = (
    r"(\()\s*([^)]*?)\s*(\))",
    r"(\[)\s*([^\]]*?)\s*(\])",
    r"({)\s*([^}]*?)\s*(})",
    r"(\")\s*([^\"]*?)\s*(\")",
    r"(')\s*([^']*?)\s*(')",
)
WIKITEXT_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(text: str) -> str:
    """WikiText as GLM's evaluation reads it: marks stand at their words, brackets and quotes hold no outer space.

    One published rule is left out: it is written as in JavaScript, and matches nothing that stands in a text.

    Source: ``tasks/language_model/detokenizer.py`` of THUDM/GLM, after Megatron-LM.
    """
    for tokens, plain in WIKITEXT_SIGNS:
        text = text.replace(tokens, plain)
    for pattern in WIKITEXT_PAIRS:
        text = re.sub(pattern, r"\1\2\3", text)
    for tokens, plain in WIKITEXT_REST:
        text = text.replace(tokens, plain)
    return text


GIGAWORD_SIGNS = {
    "-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}",
    "&amp;": "&", "&lt;": "<", "&gt;": ">",
}  # fmt: skip


def detokenize_gigaword(text: str) -> str:
    """Gigaword with brackets and signs in place of their names, and one spelling of its unknown words, ``[UNK]``.

    Source: ``gigaword_detokenize`` in ``tasks/seq2seq/dataset.py`` of THUDM/GLM.
    """
    text = text.replace("UNK", "[UNK]").replace("<unk>", "[UNK]")
    for name, sign in GIGAWORD_SIGNS.items():
        text = text.replace(name, sign)
    return text
