"""`/docs`: the OpenAPI document as one page of plain HTML. It loads nothing from anywhere, so it works wherever the API does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from litestar import Request, Response, get

from mollifier.http.openapi import complete

Node = Mapping[str, Any]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent) }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
code, summary b {{ font-family: ui-monospace, monospace; font-size: .92em }}
details {{ border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: .4rem .8rem }}
summary {{ cursor: pointer }} summary b {{ display: inline-block; min-width: 4.5em }}
summary span {{ opacity: .7; margin-left: .8em }}
table {{ border-collapse: collapse; width: 100%; margin: .3rem 0 .8rem }}
td {{ border-top: 1px solid var(--line); padding: .25rem .8rem .25rem 0; vertical-align: top }}
td:first-child {{ white-space: nowrap; width: 1% }} h4 {{ margin: .6rem 0 0 }}
:target {{ outline: 2px solid Highlight }}
</style></head><body><h1>{title} <small>{version}</small></h1><p>{description}
The machine-readable form is at <a href="/schema/openapi.json">/schema/openapi.json</a>.</p>
{body}<h2>Shapes</h2>{shapes}
<script>
addEventListener("hashchange", show); show();
function show() {{ const e = location.hash && document.querySelector(location.hash); if (e) {{ e.open = true; e.scrollIntoView() }} }}
</script></body></html>
"""


@get("/docs", include_in_schema=False, media_type="text/html")
async def docs(request: Request[Any, Any, Any]) -> Response[str]:
    """Show the document."""
    return Response(page(complete(request.app.openapi_schema.to_schema())), media_type="text/html")


def page(document: Node) -> str:
    """Return the page that shows the document."""
    sections = [
        f"<h2>{escape(tag['name'])}</h2><p>{_text(tag['description'])}</p>"
        + "".join(_operation(*found) for found in _operations(document, tag["name"]))
        for tag in document["tags"]
    ]
    shapes = sorted(document["components"]["schemas"].items())
    info = document["info"]
    return _PAGE.format(
        title=escape(info["title"]),
        version=escape(info["version"]),
        description=escape(info["description"]),
        body="".join(sections),
        shapes="".join(_shape(name, schema) for name, schema in shapes),
    )


def _operations(document: Node, tag: str) -> Iterable[tuple[str, str, Node]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if tag in operation.get("tags", ()):
                yield method, path, operation


def _operation(method: str, path: str, operation: Node) -> str:
    parts = [f"<p>{_text(operation.get('description', ''))}</p>"]
    if security := operation.get("security"):
        parts.append(
            f"<p>Needs <code>Authorization: Bearer</code> with the {escape(_words(next(iter(security[0]))))}.</p>"
        )
    if parameters := operation.get("parameters"):
        rows = [(p["name"], f"{p['in']}. {p.get('description', '')}") for p in parameters]
        parts.append("<h4>Parameters</h4>" + _table((name, _text(text)) for name, text in rows))
    if body := operation.get("requestBody"):
        parts.append("<h4>Body</h4><p>" + ", ".join(_content(body)) + "</p>")
    answers = [
        (status, f"{_text(answer['description'])} {', '.join(_content(answer))}")
        for status, answer in operation.get("responses", {}).items()
    ]
    parts.append("<h4>Answers</h4>" + _table(answers))
    head = f"<b>{method.upper()}</b> <code>{escape(path)}</code><span>{escape(operation.get('summary', ''))}</span>"
    return f'<details id="{escape(operation["operationId"])}"><summary>{head}</summary>{"".join(parts)}</details>'


def _content(node: Node) -> Iterable[str]:
    return (_type(media["schema"]) for media in node.get("content", {}).values() if "schema" in media)


def _shape(name: str, schema: Node) -> str:
    required = schema.get("required", ())
    rows = [
        (member, f"{_type(kind)}{' (required)' if member in required else ''} {_text(kind.get('description', ''))}")
        for member, kind in schema.get("properties", {}).items()
    ]
    body = _table(rows) if rows else f"<p>{_type(schema)}</p>"
    return (
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        f"<p>{_text(schema.get('description', ''))}</p>{body}</details>"
    )


def _type(schema: Node) -> str:
    """Return what a schema asks for, in a few words, with links to the shapes it names."""
    if reference := schema.get("$ref"):
        name = escape(reference.rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for union in ("anyOf", "oneOf"):
        if options := schema.get(union):
            return " or ".join(dict.fromkeys(_type(option) for option in options))
    if values := schema.get("enum"):
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in values)
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    kind = schema.get("type", "any")
    text = f"list of {_type(schema['items'])}" if kind == "array" and "items" in schema else escape(str(kind))
    limits = [f"{word} {schema[key]}" for key, word in _LIMITS.items() if key in schema]
    return f"{text} <small>{escape(', '.join(limits))}</small>" if limits else text


_LIMITS = {
    "minLength": "at least",
    "maxLength": "at most",
    "minimum": "from",
    "maximum": "to",
    "maxItems": "at most",
    "default": "default",
}


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f"<tr><td><code>{escape(first)}</code></td><td>{second}</td></tr>" for first, second in rows)
    return f"<table>{''.join(cells)}</table>"


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _words(name: str) -> str:
    return {"environmentKey": "environment's API key", "adminToken": "admin token"}.get(name, name)
