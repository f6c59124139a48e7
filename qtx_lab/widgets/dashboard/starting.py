"""The page that says "starting" where the dashboard will be, until Panel is loaded and answers itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

from ... import theme as look

REFRESH_S = 1
"""Seconds after which the page asks again."""


@contextmanager
def starting_page(socket: Path) -> Iterator[threading.Event]:
    """Answer every request on a Unix socket with a page that says "starting", and asks again by itself.

    Whoever serves the dashboard binds the same path anew, so that no request is lost, and sets the event
    that is given; the page is gone then, or at the end of the block.

    Parameters
    ----------
    socket : Path
        The path of the socket, readable by this user alone.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, starting_page(Path(folder) / "socket") as served:
    ...     oct((Path(folder) / "socket").stat().st_mode & 0o777)
    '0o600'
    """
    served = threading.Event()
    with suppress(FileNotFoundError):
        socket.unlink()
    umask = os.umask(0o177)
    try:
        server = ThreadingUnixStreamServer(str(socket), StartingHandler)
    finally:
        os.umask(umask)
    bound = socket.stat().st_ino
    server.daemon_threads = True

    def answer() -> None:
        server.serve_forever(poll_interval=0.1)

    def close_when_served() -> None:
        served.wait()
        server.shutdown()
        server.server_close()

    for task in (answer, close_when_served):
        threading.Thread(target=task, name=f"qtx-lab {task.__name__}", daemon=True).start()
    try:
        yield served
    finally:
        served.set()
        with suppress(FileNotFoundError):
            if socket.stat().st_ino == bound:  # nobody has taken its place
                socket.unlink()


class StartingHandler(BaseHTTPRequestHandler):
    """Answers with a page that says "starting"."""

    def do_GET(self) -> None:
        """Send the page."""
        page = page_html().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.end_headers()
        self.wfile.write(page)

    def address_string(self) -> str:
        """No address: the socket is of this machine."""
        return "socket"

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: the page is asked for once a second."""


def page_html() -> str:
    """The page, in the colours that the system asks for."""
    colours = {
        name: ";".join(f"--{key}:{value}" for key, value in table.items())
        for name, table in look.COLOURS.items()
    }
    return (
        f"<!DOCTYPE html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content={REFRESH_S}>"
        "<meta name=viewport content='width=device-width'><title>qtx_lab dashboard: starting</title>"
        f"<style>:root{{{colours['light']};color-scheme:light dark}}"
        f"@media(prefers-color-scheme:dark){{:root{{{colours['dark']}}}}}"
        "body{font:15px/1.5 system-ui,sans-serif;background:var(--background);color:var(--text);"
        "max-width:30em;margin:18vh auto;padding:0 1em}p{color:var(--muted)}</style>"
        "<main role=status><h1>The dashboard is starting</h1>"
        "<p>Loading the plots takes a few seconds. This page then shows the runs by itself.</p></main>"
    )
