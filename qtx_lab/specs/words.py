"""Words: what a person typed, and the value that it is by what is declared for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from typing import Any

import yaml

NULL = re.compile(r"~|null|Null|NULL|none|None|")
TRUE, FALSE = re.compile(r"true|True|TRUE"), re.compile(r"false|False|FALSE")
YES, NO = ("true", "yes", "on"), ("false", "no", "off")
WHOLE = re.compile(r"[+-]?(0|[1-9][0-9_]*)|0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+")
REAL = re.compile(r"[+-]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)([eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(r"[+-]?\.?(inf|Inf|INF|infinity|Infinity)|\.?(nan|NaN|NAN)")
QUOTED = re.compile(r"""\"(?:\\.|[^"\\])*\"|'(?:''|[^'])*'""", re.DOTALL)
"""A text in quotation marks, as YAML has it."""
OPENS_QUOTE = re.compile(r"(?:^|[\[{,:])\s*(?:[?-]\s+)?(?:![^\s,\[\]{}]*\s+)?$")
"""What stands before the quotation mark at which a text begins; YAML may mark a key by ? and a tag by !."""
MAX_EXACT_WHOLE = 2**53
"""Whole numbers up to this one are exact as floats."""


class Word(str):
    """A text that was typed without quotation marks: what it is depends on what is declared for it.

    >>> value_of(Word("0042"), {"type": "string"}), value_of(Word("1e-3"), {"type": "number"})
    ('0042', 0.001)
    """


def value_of(typed: Any, schema: Mapping[str, Any]) -> Any:
    """The value that was typed, by the JSON schema of what is declared.

    A declared text is taken as it was typed, and a number in any notation that Python or YAML knows is a
    number. Where nothing is declared, a word is what YAML 1.2 says: `no`, `0042` and `2024-01-01` are texts,
    and `1e-3` is a number. What does not fit stays as it is, so that whoever checks it can name it.

    Parameters
    ----------
    typed : object
        A `Word`, or a list or mapping with Words in it. Everything else is returned as it is.
    schema : mapping
        A JSON schema, of which the types are read; empty where nothing is declared.

    Returns
    -------
    object
        The value, without any Word.

    Examples
    --------
    >>> value_of(Word("[no, 0042]"), {"type": "array", "items": {"type": "string"}})
    ['no', '0042']
    >>> value_of(Word("[no, 0042, 12]"), {})
    ['no', '0042', 12]
    """
    return _value_of(typed, schema, {})


_UNDECLARED: Mapping[str, Any] = {}


def _value_of(typed: Any, schema: Mapping[str, Any], known: dict[tuple[int, int], Any]) -> Any:
    """Do as `value_of`; what occurs many times, by aliases of YAML, is read once."""
    if isinstance(typed, list | tuple | dict):
        place = (id(typed), id(schema))
        if place not in known:
            known[place] = _read_value(typed, schema, known)
        return known[place]
    return _read_value(typed, schema, known)


def _read_value(typed: Any, schema: Mapping[str, Any], known: dict[tuple[int, int], Any]) -> Any:
    options = [dict(option) for option in schema.get("anyOf", [schema])]
    kinds = [str(option.get("type", "")) for option in options]
    if isinstance(typed, Word):
        value = _word_value(typed, kinds)
        if isinstance(value, str) and (kinds == [""] or {"array", "object"} & set(kinds)):
            parsed = _parsed(typed)
            is_text = isinstance(parsed, Word) or ("string" in kinds and isinstance(parsed, str))
            return value if is_text else value_of(parsed, schema)
        return value
    if isinstance(typed, list | tuple):
        items = next((option.get("items") for option in options if "items" in option), None) or _UNDECLARED
        return [_value_of(item, items, known) for item in typed]
    if isinstance(typed, dict):
        of_values = next((option.get("additionalProperties") for option in options), None)
        of_values = of_values if isinstance(of_values, Mapping) else _UNDECLARED
        return {
            _value_of(key, _UNDECLARED, known): _value_of(item, of_values, known)
            for key, item in typed.items()
        }
    return typed


def word_of(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What to type so that `value_of` gives this value; None if only a text in quotation marks would.

    >>> word_of("0042", {"type": "string"}), word_of(["a", 1e-5], {}), word_of("no", {}), word_of("1", {})
    ('0042', '[a, 1.0e-05]', 'no', None)
    """
    text = value if isinstance(value, str) else write_yaml(value, one_line=True)
    return text if repr(value_of(Word(text), schema)) == repr(value) else None


def listed_word(value: Any, schema: Mapping[str, Any]) -> str:
    """What to type for this value in a list that `split_words` reads: quoted where it must be."""
    word = word_of(value, schema)
    if word is not None:
        with suppress(ValueError):
            if [repr(value_of(part, schema)) for part in split_words(word)] == [repr(value)]:
                return word
    if not isinstance(value, str):
        return write_yaml(value, one_line=True)
    return str(yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf"))).strip()


def split_words(text: str) -> list[Any]:
    """The parts of a list such as `a,[b, c],"d, e"`: texts in quotation marks, and Words for all else.

    Raises
    ------
    ValueError
        If a bracket or a quotation mark is not closed, or a part is empty.

    Examples
    --------
    >>> split_words('a,[b, c],"d, e"')
    ['a', '[b, c]', 'd, e']
    """
    parts, start, i, closing = [], 0, 0, ""
    while i <= len(text):
        mark = text[i : i + 1] or ","
        if mark in "'\"" and OPENS_QUOTE.search(text[start:i]):  # inside of a word it is a letter
            quoted = QUOTED.match(text, i)
            if quoted is None:
                raise ValueError(f"{mark} is missing")
            i = quoted.end()
            continue
        if mark in "[{":
            closing += "]" if mark == "[" else "}"
        elif closing and mark == closing[-1]:
            closing = closing[:-1]
        elif mark == "," and not closing:
            part = text[start:i].strip()
            if not part:
                raise ValueError("a value is missing")
            is_quoted = part[0] in "'\"" and part[-1] == part[0]
            parts.append(read_words(part) if is_quoted else Word(part))
            start = i + 1
        i += 1
    if closing:
        raise ValueError(f"{closing[-1]} is missing")
    return parts


def _word_value(word: Word, kinds: list[str]) -> Any:
    """The value of a single word for one of these kinds; the text itself where it is of none of them."""
    text = str(word)
    if kinds == ["string"]:
        return text
    if NULL.fullmatch(text) and (text or "null" in kinds or kinds == [""]):
        return None
    if kinds == [""] or ("string" in kinds and len(set(kinds) - {"null"}) > 1):
        value = _guess(text)
        return value if kinds == [""] or _is_of(value, kinds) else text
    number = _number(text) if {"integer", "number"} & set(kinds) else None
    if number is not None:
        return fitted(number, kinds)
    if "boolean" in kinds and text.lower() in YES + NO:
        return text.lower() in YES
    return text


def fitted(number: int | float, kinds: list[str]) -> int | float:
    """A number as the first of these kinds that holds it exactly: 1.0 as a declared whole number is 1.

    >>> fitted(1.0, ["integer", "number"]), fitted(0.5, ["integer", "number"]), fitted(1, ["number"])
    (1, 0.5, 1.0)
    """
    for kind in kinds:
        exact = abs(number) <= MAX_EXACT_WHOLE and number == int(number) if number == number else False
        if isinstance(number, float) and number == 0 and math.copysign(1, number) < 0:
            exact = False  # a whole number has no -0
        if kind == "integer" and (isinstance(number, int) or exact):
            return int(number)
        if kind == "number":
            return float(number) if isinstance(number, float) or exact else number
    return number


def _is_of(value: Any, kinds: list[str]) -> bool:
    """Whether a guessed value is of one of these kinds."""
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, int | float):
        return "number" in kinds or ("integer" in kinds and isinstance(value, int))
    return value is None and "null" in kinds


def _guess(text: str) -> Any:
    """What a word is where nothing is declared: None, a truth value, a number or the text itself."""
    if NULL.fullmatch(text):
        return None
    if TRUE.fullmatch(text) or FALSE.fullmatch(text):
        return bool(TRUE.fullmatch(text))
    is_number = any(pattern.fullmatch(text) for pattern in (WHOLE, REAL, NOT_FINITE))
    number = _number(text) if is_number else None
    return text if number is None else number


def _number(text: str) -> int | float | None:
    """A number in any notation of Python or YAML, or None."""
    plain = re.sub(r"^([+-]?)\.(?=[a-zA-Z])", r"\1", text.strip())  # YAML's .inf and .nan
    readers: tuple[Callable[[str], int | float], ...] = (int, lambda word: int(word, 0), float)
    for read in readers:
        try:
            number = read(plain)
        except ValueError:
            continue
        # 1e400 is a number that no float holds, and not infinity.
        too_large = (
            isinstance(number, float) and math.isinf(number) and not NOT_FINITE.fullmatch(text.strip())
        )
        return None if too_large else number
    return None


def read_yaml(text: str) -> Any:
    """The value that a YAML text describes, by the rules of YAML 1.2.

    Raises
    ------
    ValueError
        With one line that says what is wrong: the text is not YAML, a key is named twice, or a value does not
        fit its tag.
    """
    return value_of(read_words(text), {})


def read_words(text: str) -> Any:
    """The value that a YAML text describes, with a `Word` for each text without quotation marks.

    Raises
    ------
    ValueError
        As of `read_yaml`.
    """
    try:
        return yaml.load(text, _WordLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (TypeError, LookupError, AttributeError):  # as PyYAML fails on `!!int ''` or `!!bool x`
        raise ValueError("a tag's value does not fit it") from None


def _parsed(word: Word) -> Any:
    """A word as YAML where it is a list, a mapping or a text in quotation marks; else the word itself."""
    try:
        return read_words(str(word)) if word.strip()[:1] in tuple("[{\"'!-") else word
    except ValueError:
        return word


class _WordLoader(yaml.SafeLoader):
    """YAML in which a key that is named twice is an error; PyYAML would silently take the last one."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and value != "<<":
            return "!word"
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key.value, list):  # a key that is a list or a mapping: PyYAML refuses it below
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is named twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_WordLoader.add_constructor("!word", lambda loader, node: Word(node.value))


class _Dumper(yaml.SafeDumper):
    """YAML that reads as the same values by YAML 1.1 and by YAML 1.2."""


for _pattern in (WHOLE, REAL, NOT_FINITE, re.compile("None|none")):
    _Dumper.add_implicit_resolver("!not-a-text", re.compile(f"(?:{_pattern.pattern})$"), None)


def write_yaml(value: Any, *, one_line: bool = False) -> str:
    """A value as YAML that `read_yaml` reads as the same value, as does every reader of YAML 1.1.

    Parameters
    ----------
    value : object
        Lists, mappings, texts, numbers, truth values and None.
    one_line : bool
        Write lists and mappings in brackets, and no line breaks.
    """

    def dump(unicode: bool) -> str:
        text = yaml.dump(
            value,
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=unicode,
            default_flow_style=one_line,
            width=float("inf") if one_line else 80,
        )
        return text.removesuffix("\n").removesuffix("\n...") if one_line else text

    text = dump(True)
    # PyYAML folds the line breaks that only Unicode has; escaped they come back as they were.
    return text if text.isascii() or json.dumps(read_yaml(text)) == json.dumps(value) else dump(False)
