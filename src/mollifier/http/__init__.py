"""The HTTP API: parse, call, render.

| module | holds |
|---|---|
| `app`, `services`, `server` | the composition root, what it composes, and serving it |
| `triggers`, `runs`, `admin`, `operations` | the routes |
| `auth`, `bodies`, `raw_path` | from a request to what the flow understands |
| `render`, `problems` | and back: runs and errors as the wire format has them |
"""

from mollifier.http.app import create_app
from mollifier.http.server import serve

__all__ = ["create_app", "serve"]
