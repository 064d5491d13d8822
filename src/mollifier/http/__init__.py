"""The HTTP API: parse, call, render.

| module | holds |
|---|---|
| `app`, `services`, `server` | the composition root, what it composes, and serving it |
| `triggers`, `runs`, `listing`, `metadata`, `replays`, `keys` | the routes of environments |
| `admin`, `buffer`, `operations` | the routes of administrators and operators |
| `auth`, `bodies`, `raw_path`, `tracing` | from a request to what the flow understands |
| `render`, `problems` | and back: runs and errors as the wire format has them |
| `openapi`, `schemas`, `docs` | the documentation |
"""

from mollifier.http.app import create_app
from mollifier.http.server import serve

__all__ = ["create_app", "serve"]
