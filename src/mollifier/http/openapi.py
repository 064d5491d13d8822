"""The OpenAPI document: what the framework derives from the routes, and what it cannot see in handlers that parse by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Literal

import msgspec
from litestar import Request
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import (
    Components,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
    SecurityScheme,
    Tag,
)

from mollifier.http import schemas
from mollifier.http.problems import MEDIA_TYPE, Problem

KeyKind = Literal["environmentKey", "adminToken"]

_REFERENCE = "#/components/schemas/{name}"
_BODIES = [
    *(schemas.TriggerBody, schemas.TagsBody, schemas.RescheduleBody, schemas.MetadataBody, schemas.ResetBody),
    *(schemas.BatchBody, schemas.AnnouncementBody, schemas.BatchLineBody),
    *(schemas.RunIdsBody, schemas.NameBody, schemas.OptionalNameBody, schemas.RotationBody, schemas.FlagsBody, Problem),
]
_TAGS = {
    "Trigger": "Making runs.",
    "Batches": "Many triggers at once. Each passes the gate by itself.",
    "Runs": "What is done with a run after it was triggered. Everything is within the API key's environment.",
    "Operations": "For whoever keeps this running.",
    "Administration": "Tenants, keys and flags; needs the admin token.",
}
_ANY_BODY = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
_WITH_KEY = {
    "environmentKey": (HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE),
    "adminToken": (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.SERVICE_UNAVAILABLE),
}
_MEANINGS = {
    HTTPStatus.BAD_REQUEST: "The body is malformed",
    HTTPStatus.UNAUTHORIZED: "The key is missing or unknown",
    HTTPStatus.FORBIDDEN: "The admin API is closed: MOLLIFIER_ADMIN_TOKEN is not set",
    HTTPStatus.NOT_FOUND: "It does not exist here",
    HTTPStatus.CONFLICT: "Its state does not allow it",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is over the limit",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is not JSON",
    HTTPStatus.UNPROCESSABLE_ENTITY: "The request is invalid; `errors` names the fields",
    HTTPStatus.TOO_MANY_REQUESTS: "Too many came; try again after `Retry-After` seconds",
    HTTPStatus.SERVICE_UNAVAILABLE: "A store cannot be reached; try again after `Retry-After` seconds",
}


def documented(
    *errors: HTTPStatus,
    body: type[msgspec.Struct] | None = None,
    key: KeyKind | None = "environmentKey",
    parameters: Sequence[Parameter] = (),
    media_type: str = "application/json",
) -> type[Operation]:
    """Return what a handler takes as its `operation_class`: its body, its key, and the errors it answers."""
    statuses = {*errors, *(_ANY_BODY if body else ()), *(_WITH_KEY[key] if key else ())}

    @dataclass
    class Documented(Operation):
        def __post_init__(self) -> None:
            described = {status: answer for status, answer in (self.responses or {}).items() if status != "400"}
            for answer in described.values():
                answer.description = "As asked"
            described.update({str(int(status)): _problem(status) for status in sorted(statuses)})
            self.responses = described
            self.parameters = [*(self.parameters or ()), *parameters] or None
            self.security = [{key: []}] if key else None
            if body is not None:
                content = {media_type: OpenAPIMediaType(schema=_reference(body))}
                self.request_body = RequestBody(content=content, required=True)

    return Documented


def parameter(name: str, description: str, where: Literal["query", "header"] = "query") -> Parameter:
    """Return an optional text parameter that a handler reads by itself."""
    return Parameter(
        name=name, param_in=where, description=description, required=False, schema=Schema(type=OpenAPIType.STRING)
    )


class DocumentPlugin(JsonRenderPlugin):
    """Serves the document, at the path where tools look for it."""

    def __init__(self) -> None:
        super().__init__(media_type="application/json")  # pyright: ignore[reportArgumentType] - any media type will do

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002 - inherited
        """Return the document as JSON."""
        return msgspec.json.encode(complete(openapi_schema))


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the schemas that it refers to and the framework does not know."""
    _, bodies = msgspec.json.schema_components(_BODIES, ref_template=_REFERENCE)
    components: dict[str, Any] = document["components"]
    return {**document, "components": {**components, "schemas": {**bodies, **components["schemas"]}}}


def openapi_config() -> OpenAPIConfig:
    """Return how the document is made."""
    return OpenAPIConfig(
        title="Mollifier",
        version=version("mollifier"),
        description="Triggers runs of tasks, smoothing bursts in front of the database that records them.",
        path="/schema",
        render_plugins=[DocumentPlugin()],
        use_handler_docstrings=True,
        operation_id_creator=_operation_id,
        tags=[Tag(name, description) for name, description in _TAGS.items()],
        components=Components(
            security_schemes={
                "environmentKey": SecurityScheme(
                    type="http", scheme="bearer", description="An API key, which belongs to one environment"
                ),
                "adminToken": SecurityScheme(type="http", scheme="bearer", description="MOLLIFIER_ADMIN_TOKEN"),
            }
        ),
    )


def _operation_id(handler: HTTPRouteHandler, *_: Any) -> str:
    first, *rest = handler.handler_name.split("_")
    return first + "".join(word.title() for word in rest)


def _problem(status: HTTPStatus) -> OpenAPIResponse:
    content = {MEDIA_TYPE: OpenAPIMediaType(schema=_reference(Problem))}
    return OpenAPIResponse(description=_MEANINGS[status], content=content)


def _reference(struct: type[msgspec.Struct]) -> Reference:
    return Reference(ref=_REFERENCE.format(name=struct.__name__))
