"""Mitigated calls, and the mitigations that they used, made again from their records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..backends.ibm.calls import find_call_records
from ..backends.ibm.jobs import find_jobs
from ..errors import ArgumentError
from .calls import MitigatedCall, loader_of
from .circuit import CircuitMitigation
from .decay import SharedDecay
from .inference import ZeroNoiseInference
from .zne import ZeroNoiseExtrapolation


def find_mitigated_calls(
    home: str | Path | None = None, *, tag: str | None = None, service: Any = None
) -> list[MitigatedCall]:
    """All recorded mitigated calls, newest first, of this process or any before it. No server is asked.

    A file that is not the record of a call is left out, with a warning that says why.

    Parameters
    ----------
    home : path, optional
        The folder of runs.
    tag : str, optional
        Only the calls whose tag contains this text.
    service : QiskitRuntimeService, optional
        As for `find_jobs`.

    Returns
    -------
    list of MitigatedCall
        `call.status()` asks the server, `call.send_rest()` sends what was not sent, and `call.counts()` waits
        and makes the mitigated result.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     find_mitigated_calls(home)
    []
    """
    records = list(find_call_records(home, tag))
    jobs = {job.tag: job for job in find_jobs(home, service=service)} if records else {}
    ordered = sorted(records, key=lambda item: (item[1].recorded, item[1].tag), reverse=True)
    return [MitigatedCall(path, jobs, mitigation_of) for path, _ in ordered]


def mitigation_of(settings: Mapping[str, Any]) -> CircuitMitigation:
    """Make a mitigation again from `CircuitMitigation.settings`, as a record holds them.

    Raises
    ------
    ArgumentError
        If it used an inference that the record cannot hold.
    """
    try:
        inference = inference_of(settings["inference"])
        loader = settings["loader"] and loader_of(settings["loader"])
        return CircuitMitigation(inference, settings["readout"], loader, settings["scaling"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"The mitigation {settings.get('name')!r} cannot be made from its record ({error}): pass "
            "mitigation=."
        ) from error


def inference_of(settings: Mapping[str, Any] | None) -> ZeroNoiseInference | None:
    """Make an inference again from `ZeroNoiseInference.settings`."""
    if settings is None:
        return None
    arguments = {name: value for name, value in settings.items() if name != "kind"}
    if settings["kind"] == "shared decay":
        return SharedDecay(**arguments)
    if isinstance(arguments["asymptote"], list):
        arguments["asymptote"] = torch.tensor(arguments["asymptote"], dtype=torch.float64)
    return ZeroNoiseExtrapolation(**arguments)
