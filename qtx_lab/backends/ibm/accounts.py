"""IBM accounts: what is wrong with the one that would be used, in a sentence, before the network is used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qiskit_ibm_runtime.accounts import Account, AccountManager

from ...errors import ArgumentError, DtypeError
from .client_internals import accounts_file

CHANNELS = ("ibm_quantum_platform", "ibm_cloud")
"""Channels that IBM's client still has; both lead to the same platform."""

RETIRED_CHANNEL = "ibm_quantum"
"""The channel of the platform that IBM switched off in July 2025."""

SAVE_ACCOUNT = "`QiskitRuntimeService.save_account(token=...)` of qiskit_ibm_runtime"

NO_ACCOUNT = (
    f"No IBM Quantum account is saved on this machine, and QISKIT_IBM_TOKEN is not set: save one with "
    f"{SAVE_ACCOUNT}, or pass service=."
)

FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "url": (str,),
    "instance": (str,),
    "region": (str,),
    "plans_preference": (list,),
    "tags": (list,),
    "proxies": (dict,),
    "verify": (bool, str),
    "private_endpoint": (bool,),
}
"""What the fields of a saved account hold, besides its channel and token."""


def check_account_options(
    service: object,
    account: str | None,
    instance: str | None,
    plans_preference: Sequence[str] | None,
    instance_tags: Sequence[str] | None,
) -> None:
    """Refuse options of an account that are no names, or that would be of no use.

    Raises
    ------
    DtypeError
        If one is no name, or no sequence of names.
    ArgumentError
        If one is empty; if one is given together with a service, or plans or tags with an instance.
    """
    names: dict[str, Any] = {"account": account, "instance": instance}
    lists: dict[str, Any] = {"plans_preference": plans_preference, "instance_tags": instance_tags}
    for name, given in names.items():
        if given is not None and not isinstance(given, str):
            raise DtypeError(f"{name} is a {type(given).__name__}; it must be a name or None.")
    for name, given in lists.items():
        if given is not None and (
            isinstance(given, str)
            or not isinstance(given, Sequence)
            or not all(isinstance(x, str) for x in given)
        ):
            raise DtypeError(f"{name}={given!r} is not allowed: it must be a list of names, or None.")
    for name, given in {**names, **lists}.items():
        if given is not None and not given:
            raise ArgumentError(f"{name}={given!r} is empty; leave it out, or name one.")
    for name, given in {"account": account, **lists}.items():
        if given is not None and service is not None:
            raise ArgumentError(
                f"{name}={given!r} is not allowed together with service, which is logged in already."
            )
    for name, given in lists.items():
        if given is not None and instance is not None:
            raise ArgumentError(
                f"{name}={given!r} is not allowed together with instance, which says which one to take."
            )


def account_problem(name: str | None = None) -> str | None:
    """What is wrong with the account that IBM's client would use; None where it can try to log in.

    Parameters
    ----------
    name : str, optional
        Name of a saved account; where None, the account in the environment, or else the default one on disk.
    """
    channel, token = os.environ.get("QISKIT_IBM_CHANNEL"), os.environ.get("QISKIT_IBM_TOKEN")
    if name is None and channel and channel not in CHANNELS:
        return _channel_problem(channel, "The environment variable QISKIT_IBM_CHANNEL")
    if name is None and token:
        if not token.strip():
            return "The environment variable QISKIT_IBM_TOKEN holds only spaces: set it to an API key."
        return None
    try:
        file = accounts_file()
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except OSError as error:
        return f"IBM's file of saved accounts cannot be read: {file}: {error.strerror or error}."
    except (ValueError, RecursionError):  # RecursionError: what is nested deeply, and is not IBM's
        return _file_problem(file, "is not readable JSON")
    if not isinstance(content, dict):
        return _file_problem(file, f"holds a {type(content).__name__}, and no accounts by their names")
    return _saved_account_problem(name, content, file)


def _saved_account_problem(name: str | None, content: Mapping[str, Any], file: Path) -> str | None:
    """What is wrong with the account that would be taken from the file's content."""
    if name is not None and name not in content:
        return f"No saved account has the name {name!r}. {file} has: {', '.join(content) or 'none'}."
    if not content:
        empty = os.environ.get("QISKIT_IBM_TOKEN") == ""
        return NO_ACCOUNT.replace("is not set", "is empty") if empty else NO_ACCOUNT
    for other, account in content.items():  # IBM's client looks at all of them
        if not isinstance(account, dict) and name in (None, other):
            return _file_problem(file, f"holds a {type(account).__name__} as the account {other!r}")
    try:
        account = AccountManager.get(name=name)
    except Exception as error:  # whatever the client makes of an account that it cannot take
        others = content if name is None else [name]
        problems = [
            _field_problem(content[other], f"The saved account {other!r} in {file}") for other in others
        ]
        return next(filter(None, problems), _file_problem(file, f"has no account that can be taken: {error}"))
    where = "that is taken by default" if name is None else repr(name)
    return account and _field_problem(account.to_saved_format(), f"The saved account {where} in {file}")


def _field_problem(account: Mapping[str, Any], where: str) -> str | None:
    """What is wrong with the fields of a saved account."""
    if account.get("channel") not in CHANNELS:
        return _channel_problem(account.get("channel"), where)
    token = account.get("token")
    if not isinstance(token, str) or not token.strip():
        what = (
            f"a {type(token).__name__} as its token"
            if token and not isinstance(token, str)
            else "an empty token"
        )
        return f"{where} has {what}: save it again by {SAVE_ACCOUNT}, with overwrite=True."
    for field, types in FIELD_TYPES.items():
        value = account.get(field)
        if value is not None and not isinstance(value, types):
            return f"{where} has a {type(value).__name__} as its {field}: save it again by {SAVE_ACCOUNT}."
    return None


def _channel_problem(channel: object, where: str) -> str:
    if channel == RETIRED_CHANNEL:
        return (
            f"{where} names the channel {RETIRED_CHANNEL!r}, which IBM has retired: make an API key on "
            f"quantum.cloud.ibm.com, and save it with {SAVE_ACCOUNT}."
        )
    return f"{where} names the channel {channel!r}, which does not exist. Channels: {', '.join(CHANNELS)}."


def _file_problem(file: Path, what: str) -> str:
    return (
        f"IBM's file of saved accounts, {file}, {what}: mend or delete it, and save the account by "
        f"{SAVE_ACCOUNT}."
    )


def listed_instances(name: str | None) -> str:
    """The instances of the account, as a sentence; empty where they cannot be listed."""
    with suppress(Exception):  # this only adds to the message of an error
        account = AccountManager.get(name=name)
        listed = account.list_instances() if isinstance(account, Account) else []
        texts = [
            f"{x['name']} (plan {x['plan']}, tags {', '.join(x['tags'] or ()) or 'none'}, {x['crn']})"
            for x in listed
        ]
        return f"It has: {'; '.join(texts) or 'none'}."
    return ""
