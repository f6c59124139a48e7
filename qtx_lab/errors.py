"""The errors of the lab: each says which argument, what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QtxError(Exception):
    """Base of every error that qtx_lab raises on purpose."""


class ArgumentError(QtxError, ValueError):
    """An argument's value is not allowed: NaN, zero draws, an unknown name."""


class ShapeError(ArgumentError):
    """Tensors whose shapes do not fit each other."""


class DtypeError(QtxError, TypeError):
    """A tensor or an argument of a type that cannot be used."""


class SpecError(ArgumentError):
    """A spec, or a file or parameter meant to become one, that is not valid."""


class TextError(QtxError, OSError):
    """A text file that cannot be read."""


class StorageError(QtxError, OSError):
    """A run folder that cannot be written or read: full disk, no permission, broken file."""


class RunFailed(QtxError, RuntimeError):
    """A notebook stopped with an error; the run folder keeps what was done."""


class BackendUnavailable(QtxError, RuntimeError):
    """A device or simulator that cannot run what was asked now: no account, no network, too few qubits, a failed job."""


class JobTimeout(QtxError, TimeoutError):
    """A device job that is not done in the time given. It goes on."""


class FallbackWarning(UserWarning):
    """Something was done in another way than asked; the result's `fallbacks` say what and why."""


def unknown_name(argument: str, given: object, allowed: Iterable[str]) -> ArgumentError:
    """The error for `argument=given` where only the names `allowed` exist, nearest name first."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ArgumentError(f"{argument}={given!r} is unknown.{hint} Allowed: {', '.join(allowed)}.")
