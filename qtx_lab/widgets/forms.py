"""`SpecForm`: a form made from a spec, with help, unit, bounds and errors beside each field."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from ..errors import DtypeError, SpecError, unknown_name
from ..specs import Spec, Word, listed_word, split_words, value_of
from ..storage import write_atomic
from .comms import hear_while_busy
from .throttle import ThrottledCall

STATIC = Path(__file__).parent / "static"

FORM_LOCK = threading.RLock()
"""Whoever changes a form holds this lock until all observers of the form have been called.

A form may be linked to others, and browsers, cells and threads may change them at the same time. What
observes a form must not wait for another thread.
"""

WHOLE_NUMBER = re.compile(r"\s*[+-]?\d+\s*")
MAX_EXACT_INTEGER = 2**53
"""Larger whole numbers are not exact in JavaScript."""


ARRANGEMENTS = ("page", "column", "bar")
"""How the fields of a form can lie on the page; see `SpecForm.arrange`."""


class _Spec(traitlets.Instance):
    """A trait that one thread at a time sets; setting it clears what was typed wrongly, even if equal."""

    def __set__(self, form: Any, spec: Any) -> None:
        with FORM_LOCK:
            super().__set__(form, form._checked(spec))
            form._show_spec()


class SpecForm(anywidget.AnyWidget):
    """A form for a spec. `spec` is always the last valid one, and may be set and observed from code.

    What is typed is checked by the spec itself; while something is wrong, `spec` keeps its value, `valid` is
    False and `problems` says beside each field what was given and what is allowed. Forms are changed by one
    thread at a time, so that `traitlets.link((a, "spec"), (b, "spec"))` keeps two in step, whichever of them
    is changed.

    Parameters
    ----------
    spec : Spec or type of one
        What is shown at first; a type stands for its defaults.
    fields : sequence of str, optional
        The fields that are shown, in their order; the others keep their values. All where None.
    title : str, optional
        Name of the form for screen readers; the type's name where None.

    Raises
    ------
    DtypeError, ArgumentError
        If `spec` is no spec, or has no such field.

    Examples
    --------
    >>> from qtx_lab import SamplerSpec
    >>> form = SpecForm(SamplerSpec)
    >>> form.enter(replicates="0")
    >>> form.valid, form.spec.replicates
    (False, 1)
    >>> form.problems["replicates"]
    'replicates=0 is not allowed: it must be a whole number from 1 to 1024.'
    >>> form.change(replicates=8)
    >>> form.valid, form.spec.replicates
    (True, 8)
    """

    _esm = STATIC / "form.js"
    _css = STATIC / "form.css"

    spec = _Spec(Spec)
    valid = traitlets.Bool(True, read_only=True)
    problems = traitlets.Dict(read_only=True)
    """Errors by field; "" stands for the form as a whole, "yaml" for a file that was loaded."""
    enabled = traitlets.Bool(True).tag(sync=True)
    _title = traitlets.Unicode().tag(sync=True)
    _fields: Any = traitlets.List().tag(sync=True)
    _arrangement = traitlets.Dict({"kind": "page", "accordion": "", "open": ""}).tag(sync=True)
    # What the browser sends in messages: field -> [number of its edits, what was typed]. It is a trait so
    # that a page that is loaded anew goes on counting.
    _edits = traitlets.Dict().tag(sync=True, echo_update=False)
    _shown = traitlets.Dict().tag(sync=True)

    def __init__(
        self, spec: Spec | type[Spec], fields: Sequence[str] | None = None, *, title: str | None = None
    ):
        if isinstance(spec, type) and issubclass(spec, Spec):
            spec = spec()
        if not isinstance(spec, Spec):
            raise DtypeError(f"spec={spec!r} is not allowed: it must be a Spec, or a type of one.")
        self._kind = type(spec)
        described = described_fields(self._kind)
        for name in fields or ():
            if name not in described:
                raise unknown_name("fields", name, described)
        self._described = described
        self._entered: dict[str, Any] = {}
        self._seen_edits: dict[str, Any] = {}
        self._publish_call = ThrottledCall(self._publish)
        shown = [described[name] for name in fields or described]
        super().__init__(_title=title or self._kind.__name__, _fields=shown, spec=spec)
        hear_while_busy(self)
        self.on_msg(lambda _, content, buffers: self.set_state({"_edits": content["edits"]}))

    def arrange(self, kind: str, *, accordion: str = "", open_first: bool = False) -> None:
        """Say how the fields lie on the page.

        Parameters
        ----------
        kind : {"page", "column", "bar"}
            - "page": one under the other, with their help;
            - "column": narrow, with help as tooltips; groups are folded to a line of their values;
            - "bar": side by side, with help as tooltips.
        accordion : str
            Of a column: of all forms with the same name one group is open at a time.
        open_first : bool
            Of a column: whether its first group is open at first.

        Raises
        ------
        ArgumentError
            If there is no such kind.
        """
        if kind not in ARRANGEMENTS:
            raise unknown_name("kind", kind, ARRANGEMENTS)
        opened = self._fields[0]["group"] if open_first else ""
        self._arrangement = {"kind": kind, "accordion": accordion, "open": opened}

    def show_fields(self, *names: str) -> None:
        """Show these fields only, in this order; the others keep their values."""
        for name in names:
            if name not in self._described:
                raise unknown_name("names", name, self._described)
        self._fields = [self._described[name] for name in names]

    def suggest(self, field: str, values: Sequence[str]) -> None:
        """Offer values in a field where any text can be typed; of a mapping, names for its entries."""
        described = {**self._described[field], "suggestions": list(values)}
        self._described = {**self._described, field: described}
        self._fields = [described if shown["name"] == field else shown for shown in self._fields]

    def change(self, **fields: Any) -> None:
        """Set some fields, and leave the others as they are.

        Raises
        ------
        SpecError
            If the result is no valid spec; nothing is changed then.
        """
        with FORM_LOCK:
            self.spec = self._kind.from_parameters({**self.spec.to_parameters(), **fields})

    def enter(self, **fields: Any) -> None:
        """Do as if a person typed into fields: errors are shown beside them and not raised.

        Numbers are typed as text, switches are True or False, lists are lists of text.
        """
        with FORM_LOCK:
            self._entered |= fields
            read = {name: _read(self._described[name], value) for name, value in self._entered.items()}
            try:
                self.spec = self._kind.from_parameters(read)
            except SpecError:
                self._set_problems(self._kind.problems(read))

    def load(self, source: str | Path) -> None:
        """Show the spec of a YAML text, or of a file; see `Spec.from_yaml`.

        Raises
        ------
        SpecError
            If it holds no valid spec; the form is left as it is.
        """
        self.spec = self._kind.from_yaml(source)

    def save(self, path: str | Path) -> None:
        """Write the spec as YAML, whole or not at all.

        Raises
        ------
        StorageError
            If the file cannot be written.
        """
        write_atomic(Path(path), self.spec.to_yaml().encode())

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take in what a browser sends, holding `FORM_LOCK`."""
        with FORM_LOCK:
            super().set_state(sync_data)

    @traitlets.observe("_edits")
    def _edited(self, change: Any) -> None:
        fresh = {name: edit for name, edit in self._edits.items() if edit != self._seen_edits.get(name)}
        self._seen_edits = dict(self._edits)
        text = fresh.pop("yaml", None)
        known = {name: edit[1] for name, edit in fresh.items() if name in self._described}
        if known:
            self.enter(**known)
        if text is not None:
            try:
                self.load(f"{text[1]}\n")  # never the name of a file
            except SpecError as error:
                self._set_problems({**self.problems, "yaml": str(error)})

    def _checked(self, spec: Any) -> Spec:
        if not isinstance(spec, self._kind):
            raise DtypeError(f"spec={spec!r} is not allowed: this form is for {self._kind.__name__}.")
        return spec

    def _show_spec(self) -> None:
        values = self.spec.to_parameters()
        self._entered = {name: _written(self._described[name], value) for name, value in values.items()}
        self._set_problems({})

    def _set_problems(self, problems: dict[str, str]) -> None:
        self.set_trait("problems", problems)
        self.set_trait("valid", not problems)
        self._publish_call.request()

    def _publish(self) -> None:
        with FORM_LOCK:
            self._shown = {
                "values": self._entered,
                "problems": self.problems,
                "yaml": self.spec.to_yaml(),
                "known_edits": {name: edit[0] for name, edit in self._seen_edits.items()},
            }


def described_fields(kind: type[Spec]) -> dict[str, dict[str, Any]]:
    """Each field of a spec as a form needs it: its kind, help, unit, heading, choices and bounds."""
    described = {}
    for name, schema in kind.model_json_schema()["properties"].items():
        optional = any(option.get("type") == "null" for option in schema.get("anyOf", ()))
        plain = next((x for x in schema.get("anyOf", ()) if x.get("type") != "null"), schema)
        described[name] = {
            "name": name,
            "label": schema.get("label") or name.replace("_", " "),
            "help": schema.get("description", ""),
            "unit": _unit(schema.get("unit", "")),
            "group": schema.get("group", ""),
            "optional": optional,
            "instead_of": schema.get("instead_of", ""),
            "start": schema.get("start", ""),
            **_control(plain),
        }
        if schema.get("examples"):
            described[name]["suggestions"] = schema["examples"]
        described[name]["default"] = _written(described[name], schema.get("default"))
    return described


def _unit(unit: str) -> str:
    """The unit behind a field; empty where it would only repeat the name of the field."""
    return "" if unit in ("name", "yes or no", "path", "address", "number", "index") else unit


def _control(schema: Mapping[str, Any]) -> dict[str, Any]:
    if "enum" in schema or "const" in schema:
        return {"kind": "choice", "choices": list(schema.get("enum", [schema.get("const")]))}
    if schema.get("type") == "array":
        return {
            "kind": "list",
            "item": _control(schema.get("items", {})),
            "max_items": schema.get("maxItems"),
            "min_items": schema.get("minItems", 0),
        }
    if schema.get("type") == "object":
        listed = schema.get("additionalProperties", {}).get("type") == "array"
        return {"kind": "pairs", "listed": listed, "suggestions": []}
    if schema.get("type") == "boolean":
        return {"kind": "switch"}
    if schema.get("type") in ("integer", "number"):
        low, high = _bound(schema, "minimum", "ge", "gt"), _bound(schema, "maximum", "le", "lt")
        kind = "whole" if schema["type"] == "integer" else "number"
        exact = kind == "number" or high is None or high <= MAX_EXACT_INTEGER
        return {"kind": kind, "low": low if exact else None, "high": high if exact else None, "arrows": exact}
    return {"kind": "text", "suggestions": schema.get("examples", [])}


def _bound(schema: Mapping[str, Any], *names: str) -> float | None:
    """A bound, under any of its names: pydantic uses its own where the field may be None."""
    keys = (names[0], f"exclusive{names[0].capitalize()}", *names[1:])
    return next((schema[key] for key in keys if key in schema), None)


def _written(field: Mapping[str, Any], value: Any) -> Any:
    """A field's value as the form shows it."""
    if field["kind"] == "list":
        return [_written(field["item"], item) for item in value or ()]
    if field["kind"] == "pairs":
        texts = {name: x if field["listed"] else [x] for name, x in (value or {}).items()}
        return [[name, ", ".join(listed_word(item, {}) for item in x)] for name, x in texts.items()]
    if field["kind"] == "switch":
        return value
    return "" if value is None else str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _read(field: Mapping[str, Any], typed: Any) -> Any:
    """What was typed, as the spec takes it; what cannot be read stays as it is, and the spec refuses it."""
    kind = field["kind"]
    if kind == "list" and isinstance(typed, list):
        return [_read(field["item"], item) for item in typed]
    if kind == "pairs" and isinstance(typed, list):
        return _read_pairs(typed, field["listed"])
    if not isinstance(typed, str) or kind in ("switch", "list", "pairs"):
        return typed
    if typed == "" and field.get("optional"):
        return None
    try:
        if kind == "whole" and WHOLE_NUMBER.fullmatch(typed):
            return int(typed)
        if kind == "number":
            return float(typed)
    except ValueError:
        return typed
    return typed


def _read_pairs(typed: list[Any], listed: bool) -> Any:
    """The mapping that pairs of a name and its values or value stand for; as typed where they are none."""
    mapping: dict[str, Any] = {}
    try:
        for name, text in typed:
            if not name and not text.strip():
                continue  # a line that was added, and is still empty
            if not name or name in mapping:
                return typed
            values = [value_of(part, {}) for part in split_words(text)] if text.strip() else []
            mapping[name] = values if listed else values[0] if len(values) == 1 else value_of(Word(text), {})
    except (ValueError, TypeError, AttributeError):
        return typed
    return mapping
