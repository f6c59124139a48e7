"""The dashboard's server: who may look, the reports of runs, and the page."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import secrets
import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import panel as pn
from bokeh.server.auth_provider import AuthProvider
from bokeh.server.views.auth_request_handler import AuthRequestHandler
from tornado.web import HTTPError, RequestHandler, authenticated

from ... import theme as look
from ...errors import ArgumentError
from ...storage import runs_home
from . import maps
from .page import make_page
from .records import Records
from .run_files import find_notebook, read_report

DEFAULT_PORT = 5006
MIN_TOKEN_LENGTH = 16
"""Characters of a token that guards a public address, at least."""
WRONG_TOKEN_DELAY_S = 1.0
"""Seconds that the answer to a wrong token takes."""

REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox allow-downloads allow-popups"
)
"""What a report may do. A run folder may be anybody's, and its report is shown under our address."""


class TokenAuth(AuthProvider):
    """Lets in visitors who gave the token; where none is needed, those who came by a loopback name.

    The name is checked so that no page of another site reaches the dashboard through a name that it points at
    this machine (DNS rebinding).
    """

    def __init__(self, token: str | None, cookie: str, any_host: bool):
        self.token, self.cookie, self.any_host = token, cookie, any_host
        self.pass_ = secrets.token_urlsafe(32)  # what the cookie holds, new with every server
        super().__init__()

    @property
    def get_user(self) -> Callable[[Any], Any]:
        return self._user

    def _user(self, handler: RequestHandler) -> str | None:
        if self.token is None:
            if self.any_host or is_loopback(handler.request.host_name):
                return "reader"
            raise HTTPError(403, "This dashboard is for this machine only.")
        given = handler.get_cookie(self.cookie) or ""
        return "reader" if hmac.compare_digest(given.encode(), self.pass_.encode()) else None

    @property
    def get_user_async(self) -> None:
        return None

    @property
    def login_url(self) -> str:
        return "/login"

    @property
    def get_login_url(self) -> None:
        return None

    @property
    def login_handler(self) -> type[RequestHandler]:
        return LoginHandler

    @property
    def logout_url(self) -> None:
        return None

    @property
    def logout_handler(self) -> None:
        return None


class LoginHandler(RequestHandler):
    """Asks for the token, unless the link has it already as `?token=`."""

    async def get(self) -> None:
        if given := self.get_query_argument("token", ""):
            await self._try(given)
        else:
            self._ask("")

    async def post(self) -> None:
        await self._try(self.get_body_argument("token", ""))

    async def _try(self, given: str) -> None:
        auth = self.application.auth_provider  # type: ignore[attr-defined]
        if auth.token is not None and not hmac.compare_digest(given.encode(), auth.token.encode()):
            await asyncio.sleep(WRONG_TOKEN_DELAY_S)
            self.set_status(403)
            self._ask("This is not the token.")
            return
        home = f"{self.application.prefix}/"  # type: ignore[attr-defined]
        self.set_cookie(auth.cookie, auth.pass_, path=home, httponly=True, samesite="Lax")
        view = self._view()
        self.redirect(f"{home}?{view}" if view else home)

    def _view(self) -> str:
        """The query of the dashboard's page that was address for; "" where it was another address."""
        address = urlsplit(self.get_argument("next", ""))
        home = f"{self.application.prefix}/"  # type: ignore[attr-defined]
        return "" if address.scheme or address.netloc or address.path != home else address.query

    def _ask(self, said: str) -> None:
        home = f"{self.application.prefix}/"  # type: ignore[attr-defined]
        colours = {
            name: ";".join(f"--{key}:{value}" for key, value in table.items())
            for name, table in look.COLOURS.items()
        }
        self.set_header(
            "Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
        )
        self.write(
            "<!DOCTYPE html><html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width'>"
            f"<title>qtx_lab dashboard</title><style>:root{{{colours['light']};color-scheme:light dark}}"
            f"@media(prefers-color-scheme:dark){{:root{{{colours['dark']}}}}}"
            "body{font:15px/1.5 system-ui,sans-serif;background:var(--background);color:var(--text);"
            "max-width:26em;margin:18vh auto;padding:0 1em}"
            "input,button{font:inherit;padding:.4em .7em;margin:.3em .3em .3em 0}"
            "a{color:var(--accent)}</style><main><h1>qtx_lab dashboard</h1><form method=post>"
            f"<input type=hidden name=next value='{escape(f'{home}?{self._view()}')}'>"
            "<label for=token>Token, as printed where the dashboard was started</label><br>"
            "<input id=token name=token type=password autocomplete=current-password autofocus required>"
            f"<button>Enter</button></form><p role=alert>{escape(said)}</p></main>"
        )


class ReportHandler(AuthRequestHandler):
    """Serves the report of a run by the name of its folder."""

    def initialize(self, home: Path) -> None:
        self.home = home

    @authenticated
    async def get(self, name: str) -> None:
        content = await asyncio.to_thread(read_report, self.home, unquote(name))
        if content is None:
            raise HTTPError(404, reason="No such report")
        self.set_header("Content-Security-Policy", REPORT_POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-cache")
        self.finish(content)


class NotebookHandler(ReportHandler):
    """Gives the executed notebook of a run, as a file to save. Nothing else of the disk is served."""

    @authenticated
    async def get(self, name: str) -> None:
        notebook = await asyncio.to_thread(find_notebook, self.home, unquote(name))
        if notebook is None:
            raise HTTPError(404, reason="No such notebook")
        self.set_header("Content-Type", "application/x-ipynb+json")
        self.set_header(
            "Content-Disposition", f"attachment; filename*=UTF-8''{quote(notebook.name, safe='')}"
        )
        self.set_header("X-Content-Type-Options", "nosniff")
        self.finish(await asyncio.to_thread(notebook.read_bytes))


def is_loopback(host: str) -> bool:
    """Whether a host's name, or address, is this machine's own and nobody else's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def serve(
    home: str | Path | None = None,
    *,
    port: int = DEFAULT_PORT,
    address: str = "127.0.0.1",
    token: str | None = None,
    prefix: str = "",
    socket: str | Path | None = None,
    started: Callable[[str], None] = print,
) -> None:
    """Serve the dashboard until it is interrupted. It reads the folder of runs.

    Only tags and notes of runs are written, and only by visitors who gave the token or came by the socket.

    Parameters
    ----------
    home : path, optional
        The folder of runs, see `runs_home`. It need not exist yet.
    port : int
        0: any that is free.
    address : str
        Where it listens. Any but a loopback address needs a token.
    token : str, optional
        What visitors have to give, once in each browser. On a public address it needs 16 characters or more.
    prefix : str
        The path under which a reverse proxy shows it.
    socket : path, optional
        Listen on this Unix socket in place of a port: whoever may open the file may look (Jupyter's proxy).
    started : callable
        Called with the address once it is served.

    Raises
    ------
    ArgumentError
        Before anything is served: a public address without a token, an address or port that is not free.

    Examples
    --------
    >>> serve(address="0.0.0.0")
    Traceback (most recent call last):
    ...
    qtx_lab.errors.ArgumentError: address='0.0.0.0' can be reached from outside, and token=None: ...
    """
    token = token or None
    if socket is None and not is_loopback(address):
        _check_token(address, token)
    prefix = "/" + prefix.strip("/") if prefix.strip("/") else ""
    records = Records(runs_home(home))
    writable = token is not None or socket is not None  # else whoever is on this machine could write
    for name in ("tornado.access", "bokeh.server.util"):  # every request; that any origin may ask, see below
        logging.getLogger(name).setLevel(logging.ERROR)
    where: dict[str, Any] = {"unix_socket": str(socket)} if socket else {"port": port, "address": address}
    try:
        server = pn.io.server.get_server(
            {"/": lambda: make_page(records, prefix, writable)},  # a partial would not be called
            title={"/": "qtx_lab dashboard"},
            prefix=prefix,
            # Who may connect is decided by the cookie and by signed sessions, which no other site's page has.
            websocket_origin="*",
            secret_key=secrets.token_urlsafe(32),
            sign_sessions=True,
            auth_provider=TokenAuth(token, f"qtx-lab-{secrets.token_hex(4)}", any_host=socket is not None),
            extra_patterns=[
                (r"/report/([^/]+)", ReportHandler, {"home": records.home}),
                (r"/notebook/([^/]+)", NotebookHandler, {"home": records.home}),
            ],
            **where,
        )
    except OSError as error:
        given = f"socket={str(socket)!r}" if socket else f"port={port} of {address}"
        raise ArgumentError(f"{given} cannot be used: {error.strerror or error}. Try another.") from error
    warming = threading.Thread(target=maps.warm_up)
    warming.start()
    shown = f"[{address}]" if ":" in address else address
    entry = f"/login?token={quote(token)}" if token else "/"
    started(f"unix socket {socket}" if socket else f"http://{shown}:{server.port}{prefix}{entry}")
    try:
        with records.watched():
            server.run_until_shutdown()
    finally:
        warming.join()  # torch aborts a process that ends in the middle of its work
        if socket:
            Path(socket).unlink(missing_ok=True)


def _check_token(address: str, token: str | None) -> None:
    if token is None:
        raise ArgumentError(
            f"address={address!r} can be reached from outside, and token=None: give one with --token or "
            f"QTX_LAB_TOKEN ({MIN_TOKEN_LENGTH} characters or more), or listen on 127.0.0.1 and use ssh -L."
        )
    if len(token) < MIN_TOKEN_LENGTH:
        raise ArgumentError(
            f"token has {len(token)} characters; on address={address!r} it must have {MIN_TOKEN_LENGTH} "
            "or more."
        )
