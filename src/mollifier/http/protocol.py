"""Limits on what comes before a request's body: without them, a head that never ends fills the memory."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mollifier.errors import FieldError
from mollifier.http.problems import MEDIA_TYPE, problem_body

HEADERS_MAX = 100
HEAD_BYTES_MAX = 32 * 1024
"""Of the URL and all headers together, as they are sent."""

_DETAIL = f"The headers and the URL are too large: at most {HEADERS_MAX} headers and {HEAD_BYTES_MAX} bytes in all."


class HeadTooLargeError(Exception):
    """The request's head is over a limit."""


class LimitedProtocol(HttpToolsProtocol):
    """Refuses a head over the limits with 431 and closes the connection, where uvicorn has none.

    What the parser keeps to itself until it is complete, a header or a trailer, is bounded by the bytes that came since it last
    reported anything.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reported = False
        self._unreported_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take bytes from the network."""
        self._reported = False
        super().data_received(data)
        self._unreported_bytes = 0 if self._reported else self._unreported_bytes + len(data)
        # Trailers come after the head, and are headers to the parser.
        over = self._unreported_bytes > HEAD_BYTES_MAX or len(self.headers or ()) > HEADERS_MAX
        if over and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._reported = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._reported = True
        head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if len(self.headers) > HEADERS_MAX or head_bytes > HEAD_BYTES_MAX:
            self._refuse()
            # Nobody is asked, and nothing more of this connection is read.
            raise HeadTooLargeError
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body came."""
        self._reported = True
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless it has been answered."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def _refuse(self) -> None:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        body = problem_body(status, _DETAIL, [FieldError("headers", _DETAIL)])
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
