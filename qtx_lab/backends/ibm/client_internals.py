"""The only uses of private attributes of IBM's client, for three things that its public interface cannot do.

A job must be posted a single time, but the client sends a POST again after a server error, and no option
turns that off. The client hides why it could list no devices, in every public method that lists them. And it
does not tell in which file it looks for accounts, whose content may be anything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from qiskit_ibm_runtime.accounts import management
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, MaxRetryError, NewConnectionError
from urllib3.util.retry import Retry

from ...errors import BackendUnavailable

RETRIED_STATUS_CODES = (500, 502, 503, 504, 520, 521, 522, 524)
"""Status codes after which a GET is sent again, as IBM's client does."""

_POSTING = threading.Lock()


class SinglePost(HTTPAdapter):
    """Sends `POST .../jobs` a single time, whatever comes back, and remembers what came.

    Attributes
    ----------
    sent : bool
        Whether the request may have reached the server.
    status : int
        HTTP status of the answer; 0 where none came.
    """

    def __init__(self) -> None:
        retries = Retry(total=5, connect=3, backoff_factor=0.5, status_forcelist=RETRIED_STATUS_CODES)
        super().__init__(max_retries=retries)
        self.sent = False
        self.status = 0

    def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
        if request.method != "POST" or not request.path_url.partition("?")[0].endswith("/jobs"):
            return super().send(request, *arguments, **options)
        if self.sent:
            raise requests.ConnectionError("a second POST of the same job was stopped", request=request)
        self.sent = True
        try:
            response = super().send(request, *arguments, **options)
        except requests.ConnectionError as error:
            cause = error.args[0] if error.args else None
            reason = cause.reason if isinstance(cause, MaxRetryError) else None
            self.sent = not isinstance(reason, NewConnectionError | ConnectTimeoutError)
            raise
        self.status = response.status_code
        return response


@contextmanager
def posting_by(adapter: SinglePost, service: Any, crn: str) -> Iterator[None]:
    """While this lasts, the client posts jobs of an instance through this adapter, one thread at a time.

    Parameters
    ----------
    adapter : SinglePost
    service : QiskitRuntimeService
    crn : str
        The instance.

    Raises
    ------
    BackendUnavailable
        If the client would not use the adapter.
    """
    session = service._get_api_client(crn)._session
    url = f"{session.base_url}/jobs"
    with _POSTING:
        session.mount(url, adapter)  # requests takes the adapter with the longest prefix
        try:
            if session.get_adapter(url) is not adapter:
                raise BackendUnavailable("This qiskit-ibm-runtime cannot be kept from posting twice.")
            yield
        finally:
            session.adapters.pop(url, None)


def device_names(service: Any) -> list[str]:
    """Names of the devices of the active instance, read again from the server; raises the client's errors."""
    return sorted(device["name"] for device in service._get_api_client().list_backends())


def accounts_file() -> Path:
    """The file in which the client looks for saved accounts."""
    return Path(management._DEFAULT_ACCOUNT_CONFIG_JSON_FILE).expanduser()
