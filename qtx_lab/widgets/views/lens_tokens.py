"""Tokens as the text that they stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte that no other token stands for."""


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as in GPT-2's tokenizer."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def readable_tokens(tokens: Sequence[str]) -> list[str]:
    """The texts of tokens that are written as their vocabulary writes them.

    Byte-level vocabularies (GPT-2, Llama 3, SmolLM2) write a space as Ġ and a line's end as Ċ, those of
    SentencePiece (Llama 2, Gemma) a space as ▁. Tokens that are text already stay as they are, and so does a
    token of bytes that are only a part of a character, in which � stands for them.

    Examples
    --------
    >>> readable_tokens(["The", "Ġquick", "ĠcafÃ©", "Ċ"])
    ['The', ' quick', ' café', '\\n']
    >>> readable_tokens(["<s>", "▁The", "▁fox", "<0x0A>"])
    ['<s>', ' The', ' fox', '\\n']
    >>> readable_tokens(["naïve", " text"])
    ['naïve', ' text']
    """
    if any("Ġ" in token or "Ċ" in token for token in tokens):
        return [_decoded(token) for token in tokens]
    if any(token.startswith("▁") for token in tokens):
        plain = (token.replace("▁", " ") for token in tokens)
        return [BYTE_TOKEN.sub(lambda match: chr(int(match[1], 16)), token) for token in plain]
    return list(tokens)


def _decoded(token: str) -> str:
    if not all(character in BYTE_OF_CHARACTER for character in token):
        return token
    return bytes(BYTE_OF_CHARACTER[character] for character in token).decode("utf-8", errors="replace")
