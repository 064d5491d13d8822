"""Every route that the API serves, read from its own OpenAPI document, and a request for each that gets past its parsing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import Any

from mollifier.http.app import create_app
from mollifier.http.openapi import complete
from mollifier.settings import Settings

PUBLIC = {"/docs", "/schema", "/schema/openapi.json", "/schema/{path}"}
"""Served, and not in the document itself."""

# A body that each route takes, by the name of its schema. A new body belongs here, or its route is tested with none that it takes.
BODIES: Mapping[str, Any] = {
    "TriggerBody": {"payload": 1},
    "BatchBody": {"items": [{"task": "echo", "payload": 1}]},
    "AnnouncementBody": {"runCount": 1},
    "BatchLineBody": {"index": 0, "task": "echo", "payload": 1},
    "TagsBody": {"tags": ["foreign"]},
    "RescheduleBody": {"delay": "2h"},
    "MetadataBody": {"metadata": {"foreign": 1}, "operations": [{"type": "increment", "key": "n", "value": 1}]},
    "ResetBody": {"taskIdentifier": "echo"},
    "RunIdsBody": {"runIds": ["run_foreign"]},
    "NameBody": {"name": "foreign"},
    "OptionalNameBody": {"name": "foreign"},
    "RotationBody": {"overlap": "1h"},
    "FlagsBody": {"foreign": True},
}


@dataclass(frozen=True)
class Route:
    """One operation. `kinds` are what its path names, by parameter: the segment before each says what it is of."""

    method: str
    path: str
    security: str | None
    query: tuple[str, ...]
    kinds: Mapping[str, str]
    body: str | None
    media_type: str
    statuses: frozenset[int]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def paths(self, ids: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """Yield the path for every way of naming what is there; `ids` are by kind, percent-encoded. A kind it lacks is a KeyError."""
        for chosen in product(*(ids[kind] for kind in self.kinds.values())):
            yield self.path.format(**dict(zip(self.kinds, chosen, strict=True)))

    def content(self) -> tuple[bytes, Mapping[str, str]]:
        """Return a body that it takes, and the header that says what it is."""
        if self.body is None:
            return b"", {}
        return json.dumps(BODIES[self.body]).encode(), {"content-type": self.media_type}


def routes() -> list[Route]:
    """Return every operation of the document."""
    return [
        _route(path, method, operation)
        for path, item in document()["paths"].items()
        for method, operation in item.items()
    ]


@cache
def document() -> Mapping[str, Any]:
    """Return the OpenAPI document as it is served."""
    app = create_app(Settings(database_url="postgresql://h/d"))
    return complete(app.openapi_schema.to_schema())


def _route(path: str, method: str, operation: Mapping[str, Any]) -> Route:
    segments = path.split("/")
    named = [(before, name[1:-1]) for before, name in pairwise(segments) if name[:1] == "{"]
    content = operation.get("requestBody", {}).get("content", {})
    media_type, media = next(iter(content.items()), ("", None))
    parameters = operation.get("parameters", ())
    return Route(
        method=method.upper(),
        path=path,
        security=next(iter(operation["security"][0])) if operation.get("security") else None,
        query=tuple(parameter["name"] for parameter in parameters if parameter["in"] == "query"),
        kinds={name: before for before, name in named},
        body=None if media is None else media["schema"]["$ref"].rpartition("/")[2],
        media_type=media_type,
        statuses=frozenset(int(status) for status in operation["responses"]),
    )
