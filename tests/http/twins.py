"""Two tenants who ask the same: the runs of one are created, those of the other are held; no answer may tell which is which."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast
from urllib.parse import quote

import httpx

from mollifier.model import Tenant
from tests.http.conftest import TASK, Api, Diverting, bearer

# Lengths follow from how many digits a moment has.
HEADERS_OF_ITS_OWN = {"date", "content-length"}
MOMENTS = {"createdAt", "updatedAt", "startedAt", "finishedAt", "delayedUntil", "expiredAt"}


@dataclass(frozen=True)
class Told:
    """An answer with ids and moments put into words that are the same for both tenants."""

    status: int
    headers: Mapping[str, str]
    body: Any


class Twin:
    """One of the two. Its ids have names, `<run>` for example; a name stands for the last id that it was given to."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self._ids: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self.call("<env>", tenant.env_id)

    def call(self, name: str, text: str, *, told: bool = True) -> None:
        """Give the text this name, in what is asked and, unless it is no id, in what is told."""
        self._ids[name] = text
        if told:
            self._names[text] = name

    def id(self, name: str) -> str:
        """Return what has this name."""
        return self._ids[name]

    def filled(self, text: str, *, in_path: bool = False) -> str:
        """Put its ids into the places of their names."""
        for name, value in self._ids.items():
            text = text.replace(name, quote(value, safe="") if in_path else value)
        return text

    def told(self, answer: httpx.Response) -> Told:
        """Return the answer with names in the places of ids."""
        headers = {name: self._named(value) for name, value in answer.headers.items() if name not in HEADERS_OF_ITS_OWN}
        return Told(answer.status_code, headers, _timeless(self._named(answer.text)))

    def _named(self, text: str) -> str:
        for value in sorted(self._names, key=len, reverse=True):
            text = text.replace(value, self._names[value])
        return text


class Twins:
    """Sends every request for both, has the answers be the same but for ids and moments, and returns what they say."""

    def __init__(self, diverting: Diverting, other: Tenant) -> None:
        self._diverting = diverting
        self.held = Twin(diverting.tenant)
        self.created = Twin(other)

    @property
    def _api(self) -> Api:
        return self._diverting.api

    async def trigger(self, name: str, payload: Any = None, *, task: str = TASK, **options: Any) -> None:
        """Trigger a run, which is called `<name>` from here on: one is created, one held."""
        queued = await self._diverting.queued()
        await self.ask(
            "POST", f"/api/v1/tasks/{quote(task, safe='')}/trigger", {"payload": payload, "options": options}, name
        )
        assert await self._diverting.queued() == queued + 1

    async def ask(
        self, method: str, path: str, body: Any = None, name: str | None = None, kind: str = "application/json"
    ) -> Told:
        """Ask the same for both. The id in the answer is called `<name>` from here on.

        What else an answer leads to has a name too: cursors are `<next>` and `<previous>`, the runs of a batch `<item 0>` and so on.

        A body is a value, or bytes that are sent as they are.
        """
        answers: list[Told] = []
        for twin in (self.created, self.held):
            answer = await self._send(twin, method, path, body, kind)
            for given, value in _learnt(answer, name):
                twin.call(given, value)
            answers.append(twin.told(answer))
        created, held = answers
        assert held == created, f"{method} {path} {body}"
        return created

    async def seen(self, twin: Twin, path: str) -> httpx.Response:
        """Return what one of them is answered there, as it is."""
        answer = await self._api.get(twin.tenant, twin.filled(path, in_path=True))
        assert answer.status_code == 200, answer.text
        return answer

    async def hold(self) -> None:
        """Have the triggers of the one held from now on, as they are at first."""
        await self._diverting.hold()

    async def calm(self) -> None:
        """Have the triggers of both created from now on."""
        await self._diverting.calm()

    async def drain(self, most: int | None = None) -> int:
        """Create the runs that are held and due, at most so many; return how many."""
        return await self._diverting.drain(most)

    async def _send(self, twin: Twin, method: str, path: str, body: Any, kind: str) -> httpx.Response:
        headers, content = bearer(twin.tenant), b""
        if body is not None:
            headers["content-type"] = kind
            content = body if isinstance(body, bytes) else twin.filled(json.dumps(body)).encode()
        return await self._api.client.request(method, twin.filled(path, in_path=True), content=content, headers=headers)


def _learnt(answer: httpx.Response, name: str | None) -> Iterator[tuple[str, str]]:
    if not answer.is_success:
        return
    found = answer.json()
    if name is not None:
        yield f"<{name}>", found["id"]
    yield from ((f"<{which}>", cursor) for which, cursor in found.get("pagination", {}).items())
    yield from ((f"<item {place}>", run_id) for place, run_id in enumerate(found.get("runs", ())))


def _timeless(text: str) -> Any:
    """Read a JSON text, moments by what they have to do with each other."""
    try:
        return _relative(json.loads(text))
    except json.JSONDecodeError:
        return text


def _relative(value: Any) -> Any:
    if isinstance(value, list):
        return [_relative(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        return {name: _moment(members, name) if name in MOMENTS else _relative(members[name]) for name in members}
    return value


def _moment(members: Mapping[str, Any], name: str) -> Any:
    """Return what a moment is told by: another one that it equals, whole seconds since the creation, or only that it came later."""
    told: str = members[name]
    if name in ("createdAt", "updatedAt") or "createdAt" not in members:
        return next((other for other in ("createdAt", "finishedAt") if members.get(other) == told), "later")
    moment = datetime.fromisoformat(told)
    seconds = (moment - datetime.fromisoformat(members["createdAt"])).total_seconds()
    if seconds.is_integer():
        return seconds
    return "later" if moment.microsecond else told
