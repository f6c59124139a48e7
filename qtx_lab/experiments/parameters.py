"""Parameters of a notebook: what its cell tagged `parameters` declares, read without running it."""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ArgumentError
from ..specs import fitted, value_of

UNKNOWN = object()
"""Stands for a default that is known only when the notebook runs."""

CONSTRUCTORS = ("bool", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")
"""Built-in types that a default may be made by, as in `d = dict(a=1)`."""

OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
MAX_OPERAND = 2**20
"""Largest number that is computed with: `10**9**9` in a cell must not stop whoever reads it."""

KINDS: dict[type, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"anyOf": [{"type": "integer"}, {"type": "number"}]},  # a whole number where it is one
    float: {"type": "number"},
    str: {"type": "string"},
    list: {"type": "array"},
    tuple: {"type": "array", "python": "tuple"},
    set: {"type": "array", "python": "set"},
    frozenset: {"type": "array", "python": "frozenset"},
    dict: {"type": "object"},
}
"""The JSON schema of what a default of each type declares; `python` is the type that its cell is given."""

ANNOTATIONS: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": "string"},
    "Path": {"type": "string"},
    "None": {"type": "null"},
    **{name: {"type": "array"} for name in ("list", "List", "Sequence", "Iterable", "Collection")},
    **{
        name: {"type": "array", "python": name.lower()}
        for name in ("tuple", "Tuple", "set", "Set", "frozenset", "FrozenSet")
    },
    **{name: {"type": "object"} for name in ("dict", "Dict", "Mapping", "MutableMapping")},
}
"""The JSON schema of what a type hint declares; other hints declare nothing."""

IN_WORDS = {
    "boolean": "yes or no",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "a mapping",
    "null": "None",
}
IN_PLURAL = {
    "boolean": "truth values",
    "integer": "whole numbers",
    "number": "numbers",
    "string": "texts",
    "array": "lists",
    "object": "mappings",
    "null": "None",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook.

    Parameters
    ----------
    name : str
        The name that the cell assigns.
    source : str
        The text of its default in the cell; "" where it has a type hint alone.
    default : object
        The default, or `UNKNOWN` where only running the notebook would tell.
    schema : dict
        The JSON schema of the values that it takes; empty where nothing is declared.
    hinted : bool
        Whether the schema comes from a type hint.
    """

    name: str
    source: str
    default: Any = UNKNOWN
    schema: dict[str, Any] = field(default_factory=dict)
    hinted: bool = False

    @property
    def kinds(self) -> list[str]:
        """The types of the schema; empty where any value is allowed."""
        return [str(option["type"]) for option in self.schema.get("anyOf", [self.schema]) if "type" in option]

    @property
    def required(self) -> bool:
        """Whether the cell gives it a type hint and no value."""
        return not self.source

    def taken(self, value: Any) -> Any:
        """A value that was given, as the declared kind takes it.

        A `Word` is taken by its meaning, and 1.0 as 1, or 1 as 1.0, so that the two are one parameter.
        """
        return _taken(value_of(value, self.schema), self.schema)

    def problem(self, value: Any) -> str | None:
        """What is declared, in words, where a value is of another kind; None where it fits."""
        return None if _fits(value, self.schema, self.hinted) else _in_words(self.schema, IN_WORDS)

    def injected(self, value: Any) -> Any:
        """A value as the notebook is given it: a list is a tuple or a set where the cell declares one."""
        return _as_python(value, self.schema)


def _fits(value: Any, schema: Mapping[str, Any], hinted: bool) -> bool:
    """Whether a value, and what is in it, is of the kinds that a schema declares.

    None fits everything but a type hint that does not name it.
    """
    options = [dict(option) for option in schema.get("anyOf", [schema])]
    kinds = [option.get("type") for option in options]
    if None in kinds or (value is None and not hinted):
        return True
    given = next((kind for kind, types in _PYTHON_TYPES.items() if isinstance(value, types)), None)
    if given is None:  # a type that JSON does not know is refused elsewhere
        return True
    fitting = [
        option for option in options if option["type"] in (given, "number" if given == "integer" else given)
    ]
    inner = {"array": "items", "object": "additionalProperties"}.get(given)
    if inner is None:
        return bool(fitting)
    items = list(value.values() if isinstance(value, Mapping) else value)
    return any(all(_fits(item, option.get(inner, {}), hinted) for item in items) for option in fitting)


def _in_words(schema: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """What a schema declares, such as "a list of numbers"; the words are `IN_WORDS` or `IN_PLURAL`."""
    options = [dict(option) for option in schema.get("anyOf", [schema])]
    kinds = [option["type"] for option in options]
    named = []
    for option in options:
        kind = option["type"]
        if kind == "integer" and "number" in kinds:
            continue
        inner = option.get("items" if kind == "array" else "additionalProperties") or {}
        if "type" in inner or "anyOf" in inner:
            link = " of " if kind == "array" else " whose values are "
            named.append(words[kind] + link + _in_words(inner, IN_PLURAL))
        else:
            named.append(words[kind])
    return " or ".join(dict.fromkeys(named))


def _as_python(value: Any, schema: Mapping[str, Any]) -> Any:
    """A value whose lists are of the types that a schema declares."""
    options = [dict(option) for option in schema.get("anyOf", [schema])]
    if isinstance(value, Mapping):
        of_values: dict[str, Any] = next((option.get("additionalProperties", {}) for option in options), {})
        return {key: _as_python(item, of_values) for key, item in value.items()}
    option = next((option for option in options if option.get("type") == "array"), None)
    if option is None or not isinstance(value, list | tuple):
        return value
    items = [_as_python(item, option.get("items", {})) for item in value]
    make: Any = {"tuple": tuple, "set": set, "frozenset": frozenset}.get(option.get("python", ""), list)
    try:
        return make(items)
    except TypeError:  # a set cannot hold lists
        return items


def _taken(value: Any, schema: Mapping[str, Any]) -> Any:
    """A value whose numbers are of the kind that a schema declares."""
    options = [dict(option) for option in schema.get("anyOf", [schema])]
    if isinstance(value, int | float) and not isinstance(value, bool):
        kinds = [kind for option in options if (kind := option.get("type")) in ("integer", "number")]
        return fitted(value, kinds)
    if isinstance(value, list | tuple):
        items: dict[str, Any] = next((option["items"] for option in options if "items" in option), {})
        return [_taken(item, items) for item in value]
    if isinstance(value, Mapping):
        of_values: dict[str, Any] = next((option.get("additionalProperties", {}) for option in options), {})
        return {key: _taken(item, of_values) for key, item in value.items()}
    return value


_PYTHON_TYPES: dict[str, Any] = {
    "boolean": bool,
    "integer": int,
    "number": float,
    "string": str,
    "array": list | tuple | set | frozenset,
    "object": dict,
    "null": type(None),
}
"""Types of values by the names of a JSON schema; a truth value is a number to Python and not to us."""


def parameters_of(source: str) -> dict[str, Parameter]:
    """The parameters that a cell declares: the names that it assigns outside of any block.

    Comments, texts, imports and definitions declare nothing. A name that is assigned more than once has its
    last default; one that a block, such as an `if`, may change has a default that is not known.

    Parameters
    ----------
    source : str
        The cell; it may have magics of IPython.

    Raises
    ------
    ArgumentError
        If it is not Python.

    Examples
    --------
    >>> cell = 'lr: float | None = None  # n = 1\\na, b = 1, "x=y"; c = dict(d=a)'
    >>> {name: parameter.default for name, parameter in parameters_of(cell).items()}
    {'lr': None, 'a': 1, 'b': 'x=y', 'c': {'d': 1}}
    """
    tree = _parsed(source)
    parameters: dict[str, Parameter] = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=targets, value=value):
                default = _value(value, parameters)
                if default is UNKNOWN:
                    _note_changes(parameters, value)
                for target in targets:
                    _assign(parameters, target, value, default, statement.type_comment)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=hint, value=None):
                parameters.setdefault(name, Parameter(name, "", UNKNOWN, _hinted(hint), True))
            case ast.AnnAssign(target=ast.Name(id=name), annotation=hint, value=value) if value is not None:
                default = _value(value, parameters)
                if default is UNKNOWN:
                    _note_changes(parameters, value)
                _add(parameters, name, ast.unparse(value), default, _hinted(hint))
            case ast.Delete(targets=targets):
                for name in _names(*targets):
                    parameters.pop(name, None)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value) if name in parameters:
                together = ast.BinOp(ast.Name(name, ast.Load()), op, value)
                default = _value(together, parameters)
                if not isinstance(parameters[name].default, int | float | str | tuple):
                    _forget_contents(parameters)  # `a += [1]` changes every other name of the list too
                _add(parameters, name, ast.unparse(together), default, {})
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                for alias in names:
                    parameters.pop(alias.asname or alias.name.split(".")[0], None)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                parameters.pop(name, None)
            case ast.Expr(value=ast.Constant()):  # a text between statements
                pass
            case _:  # whatever else may change what was assigned
                _note_changes(parameters, statement.value if isinstance(statement, ast.Expr) else statement)
    return parameters


def _parsed(source: str) -> ast.Module:
    """A cell as a syntax tree, with the types that comments state where they can be read."""
    from IPython.core.inputtransformer2 import TransformerManager

    text = TransformerManager().transform_cell(source)
    with suppress(SyntaxError):
        return ast.parse(text, type_comments=True)
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ArgumentError(f"The cell tagged `parameters` is not Python: {reason}{line}.") from None


def _assign(
    parameters: dict[str, Parameter], target: ast.expr, node: ast.expr, value: Any, comment: str | None
) -> None:
    """Note what an assignment gives to each name of its target."""
    if isinstance(target, ast.Name):
        hint = _hinted(_annotation(comment)) if comment else {}
        _add(parameters, target.id, ast.unparse(node), value, hint)
    elif isinstance(target, ast.Tuple | ast.List):
        for name, item in _unpacked(target, value):
            source = ast.unparse(node) if item is UNKNOWN else repr(item)
            _add(parameters, name, source, item, {})
    else:  # an item or an attribute of something that was assigned
        _forget_contents(parameters)


def _unpacked(target: ast.Tuple | ast.List, value: Any) -> Iterator[tuple[str, Any]]:
    """The names of a target, each with its part of the value."""
    parts: list[Any] = [UNKNOWN] * len(target.elts)
    star = next((i for i, part in enumerate(target.elts) if isinstance(part, ast.Starred)), None)
    if value is not UNKNOWN:
        with suppress(TypeError, ValueError):
            items = list(value)
            if star is None and len(items) == len(parts):
                parts = items
            elif star is not None and len(items) >= len(parts) - 1:
                end = len(items) - (len(parts) - 1 - star)
                parts = [*items[:star], items[star:end], *items[end:]]
    for part, item in zip(target.elts, parts, strict=True):
        inner = part.value if isinstance(part, ast.Starred) else part
        if isinstance(inner, ast.Name):
            yield inner.id, item
        elif isinstance(inner, ast.Tuple | ast.List):
            yield from _unpacked(inner, item)


def _add(
    parameters: dict[str, Parameter], name: str, source: str, default: Any, hint: dict[str, Any]
) -> None:
    """Add a parameter; without a hint of its own it keeps an earlier one, or its default declares a kind."""
    earlier = parameters.pop(name, None)
    if not hint and earlier is not None and earlier.hinted:
        hint = earlier.schema
    if hint and default is None and "null" not in str(hint):
        hint = {"anyOf": [*hint.get("anyOf", [hint]), {"type": "null"}]}
    parameters[name] = Parameter(name, source, default, hint or _schema_of(default), bool(hint))


def _schema_of(default: Any) -> dict[str, Any]:
    """What a default declares: its kind, and that of the items of a list, where they are all of one."""
    if default is UNKNOWN or default is None or type(default) not in KINDS:
        return {}
    schema = dict(KINDS[type(default)])
    if isinstance(default, list | tuple | set | frozenset) and default:
        kinds = [_schema_of(item) for item in default]
        if all(kind in (KINDS[int], KINDS[float]) for kind in kinds):
            schema["items"] = KINDS[float] if KINDS[float] in kinds else KINDS[int]
        elif all(kind == kinds[0] for kind in kinds):
            schema["items"] = kinds[0]
    return schema


def _note_changes(parameters: dict[str, Parameter], node: ast.AST) -> None:
    """Forget the defaults that a statement or expression, which is not computed here, may change."""
    for name in _names(node):
        if name in parameters:
            parameters[name] = replace(parameters[name], default=UNKNOWN)
        elif isinstance(node, ast.expr):  # `(n := 1)`
            parameters[name] = Parameter(name, "...")
    if any(isinstance(inner, ast.Name) and inner.id in parameters for inner in ast.walk(node)):
        _forget_contents(parameters)


def _forget_contents(parameters: dict[str, Parameter]) -> None:
    """Forget the defaults that can be changed in place, such as lists."""
    for name, parameter in parameters.items():
        if isinstance(parameter.default, list | dict | set | tuple):
            parameters[name] = replace(parameter, default=UNKNOWN)


def _names(*nodes: ast.AST) -> list[str]:
    """The names that are assigned or deleted inside nodes, outside of functions and comprehensions."""
    names, left = [], list(nodes)
    while left:
        node = left.pop(0)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.append(node.id)
        if isinstance(node, ast.comprehension):
            left += [node.iter, *node.ifs]
        elif not isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            left += ast.iter_child_nodes(node)
    return names


def _value(node: ast.AST, parameters: Mapping[str, Parameter]) -> Any:
    """The value of an expression of literals, built-in types, arithmetic and earlier names, or `UNKNOWN`."""
    try:
        return _computed(node, parameters)
    except Exception:  # any error: running the cell would raise it too, or the value is not known
        return UNKNOWN


def _computed(node: ast.AST, parameters: Mapping[str, Parameter]) -> Any:
    def value(inner: ast.AST) -> Any:
        return _computed(inner, parameters)

    match node:
        case ast.Constant(value=constant):
            return constant
        case ast.Tuple(elts=items):
            return tuple(_items(items, value))
        case ast.List(elts=items):
            return list(_items(items, value))
        case ast.Set(elts=items):
            return set(_items(items, value))
        case ast.Dict(keys=keys, values=values):
            entries: dict[Any, Any] = {}
            for key, item in zip(keys, values, strict=True):
                entries |= value(item) if key is None else {value(key): value(item)}
            return entries
        case ast.Name(id=name) if name in parameters and parameters[name].default is not UNKNOWN:
            return parameters[name].default
        case ast.Call(func=ast.Name(id=name)) if name in CONSTRUCTORS and name not in parameters:
            named = {key.arg: value(key.value) for key in node.keywords if key.arg is not None}
            return getattr(builtins, name)(*_items(node.args, value), **named)
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](value(operand))
        case ast.BinOp(left=left, op=op, right=right):
            operands = value(left), value(right)
            if any(isinstance(x, int | float) and abs(x) > MAX_OPERAND for x in operands):
                raise ValueError("too large")
            if isinstance(op, ast.Mod) and isinstance(operands[0], str | bytes):
                raise ValueError("may be too large")
            if isinstance(op, ast.Pow) and not all(abs(x) <= 64 for x in operands):
                raise ValueError("too large")
            sizes = [len(x) for x in operands if isinstance(x, str | bytes | list | tuple)]
            if isinstance(op, ast.Mult) and sizes and max(sizes) * max(_counts(operands)) > MAX_OPERAND:
                raise ValueError("too large")
            return OPERATORS[type(op)](*operands)
    raise ValueError("not known")


def _counts(operands: tuple[Any, ...]) -> list[int]:
    return [x for x in operands if isinstance(x, int)] or [1]


def _items(nodes: list[ast.expr], value: Any) -> list[Any]:
    """The values of items, of which some may be `*lists`."""
    items: list[Any] = []
    for node in nodes:
        if isinstance(node, ast.Starred):
            items += value(node.value)
        else:
            items.append(value(node))
    return items


def _annotation(text: str) -> ast.AST:
    """A type hint that is written as text; one that cannot be read declares nothing."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return ast.Constant(...)


def _hinted(hint: ast.AST) -> dict[str, Any]:
    """The JSON schema of a type hint; empty where it allows anything that JSON knows."""
    match hint:
        case ast.Constant(value=None):
            return ANNOTATIONS["None"]
        case ast.Constant(value=str(text)):
            return _hinted(_annotation(text))
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return dict(ANNOTATIONS.get(name, {}))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _any_of([left, right])
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inside):
            parts = list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]
            match name:
                case "Optional":
                    return _any_of([*parts, ast.Constant(None)])
                case "Union":
                    return _any_of(parts)
                case "Annotated" | "Final" | "ClassVar":
                    return _hinted(parts[0])
                case "Literal":
                    types = {type(part.value) for part in parts if isinstance(part, ast.Constant)}
                    return dict(KINDS[types.pop()]) if len(types) == 1 and types <= set(KINDS) else {}
            schema = dict(ANNOTATIONS.get(name, {}))
            if schema.get("type") == "object" and len(parts) == 2:
                schema["additionalProperties"] = _hinted(parts[1])
            if schema.get("type") == "array":
                items = [_hinted(part) for part in parts if not _is_ellipsis(part)]
                schema["items"] = items[0] if all(item == items[0] for item in items) else {}
            return schema
    return {}


def _is_ellipsis(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _any_of(hints: list[ast.expr]) -> dict[str, Any]:
    """The schema of a union; empty where one of its hints allows anything."""
    options: list[dict[str, Any]] = []
    for hint in hints:
        schema = _hinted(hint)
        if not schema:
            return {}
        options += schema.get("anyOf", [schema])
    return {"anyOf": options}
