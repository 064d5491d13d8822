"""Every route answers for a held run as for a created one: the same status, headers and fields, but for ids and moments."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest

from mollifier.fields import DEPTH_MAX
from mollifier.model import Tenant
from mollifier.postgres.database import Database
from mollifier.postgres.upkeep import Upkeep
from tests.core.support import until
from tests.http.conftest import Diverting, raw_member
from tests.http.twins import Told, Twins

pytestmark = pytest.mark.leaves_keys

READS = (
    "/api/v3/runs/<run>",
    "/api/v1/runs/<run>/result",
    "/api/v1/runs/<run>/metadata",
    "/api/v1/runs",
)
OPTIONS: dict[str, Any] = {
    "idempotencyKey": "order/1 ä",
    "idempotencyKeyTTL": "1h",
    "tags": ["red", "blue"],
    "ttl": "1h",
    "metadata": {"n": 1, "l": []},
    "queue": {"name": "q"},
    "concurrencyKey": 7,
    "priority": 3,
    "machine": "small-1x",
    "region": "eu",
    "maxAttempts": 4,
    "maxDuration": 60,
    "test": True,
    "lockToVersion": "v1",
    "parentBatch": "batch_b",
}


@pytest.fixture
async def twins(diverting: Diverting, neighbour: Tenant) -> Twins:
    await diverting.hold()
    return Twins(diverting, neighbour)


async def read(twins: Twins) -> list[Told]:
    """Read all that there is to read of the run."""
    return [await twins.ask("GET", path) for path in READS]


Step = tuple[str, str, Any]
RUN = "/api/v1/runs/<run>"
CANCEL: Step = ("POST", "/api/v2/runs/<run>/cancel", None)
SCENES: dict[str, tuple[dict[str, Any], Sequence[Step]]] = {
    "left alone": ({}, []),
    "triggered with every option": (OPTIONS, []),
    "delayed": ({"delay": "1h", "ttl": 60}, []),
    "delayed until a moment": ({"delay": "2999-01-31T12:00:00Z"}, []),
    "rescheduled": (
        {"delay": "1h", "idempotencyKey": "of a delayed run"},
        [
            ("POST", f"{RUN}/reschedule", {"delay": "2999-01-31T12:00:00Z"}),
            ("POST", f"{RUN}/reschedule", {"delay": "2998-01-31T12:00:00+02:00"}),
        ],
    ),
    "rescheduled though it is not delayed": ({}, [("POST", f"{RUN}/reschedule", {"delay": "1h"})]),
    "cancelled, and changed after that": (
        {"delay": "1h", "tags": "a"},
        [
            CANCEL,
            CANCEL,
            ("POST", f"{RUN}/reschedule", {"delay": "1h"}),
            ("POST", f"{RUN}/tags", {"tags": "b"}),
            ("PUT", f"{RUN}/metadata", {"operations": [{"type": "set", "key": "a", "value": 1}]}),
        ],
    ),
    "tagged": (
        {"tags": ["a"]},
        [
            ("POST", f"{RUN}/tags", {"tags": ["b", "a", "ä, \u2603"]}),
            ("POST", f"{RUN}/tags", {"tags": "c"}),
            ("POST", f"{RUN}/tags", {"tags": []}),
            ("POST", f"{RUN}/tags", {"tags": [str(number) for number in range(7)]}),
            ("POST", f"{RUN}/tags", {"tags": [str(number) for number in range(6)]}),
        ],
    ),
    "with metadata that is changed": (
        {"metadata": {"n": 1, "l": [1]}},
        [
            ("PUT", f"{RUN}/metadata", {}),
            ("PUT", f"{RUN}/metadata", {"operations": [{"type": "increment", "key": "n", "value": 0.5}]}),
            ("PUT", f"{RUN}/metadata", {"operations": [{"type": "append", "key": "l", "value": {"a\0": None}}]}),
            ("PUT", f"{RUN}/metadata", {"operations": [{"type": "increment", "key": "l", "value": 1}]}),
            ("PUT", f"{RUN}/metadata", {"metadata": {"whole": True}, "parentOperations": []}),
        ],
    ),
    "whose key is reset": (
        {"idempotencyKey": "k/ä"},
        [
            ("POST", "/api/v1/idempotencyKeys/k%2F%C3%A4/reset", {"taskIdentifier": "other"}),
            ("POST", "/api/v1/idempotencyKeys/k%2F%C3%A4/reset", {"taskIdentifier": "echo"}),
            ("POST", "/api/v1/idempotencyKeys/k%2F%C3%A4/reset", {"taskIdentifier": "echo"}),
        ],
    ),
}


async def test_a_run_that_is_held_answers_as_one_that_is_created(twins: Twins, subtests: pytest.Subtests) -> None:
    for scene, (options, steps) in SCENES.items():
        with subtests.test(scene):
            await twins.trigger("run", {"a": [1e300, "ä"]}, **options)

            await read(twins)
            for method, path, body in steps:
                await twins.ask(method, path, body)
                await read(twins)
            seen = await read(twins)
            await twins.drain()

            assert await read(twins) == seen


async def test_a_family_of_held_runs_reads_as_one_of_created_runs(twins: Twins) -> None:
    await twins.trigger("root")
    await twins.trigger("parent", parentRunId="<root>", tags="p")
    for child in ("a", "b"):
        await twins.trigger(child, parentRunId="<parent>")
    await twins.ask("PUT", "/api/v1/runs/<b>/metadata", {"rootOperations": [{"type": "set", "key": "x", "value": 1}]})
    paths = [f"/api/v3/runs/<{name}>" for name in ("root", "parent", "a", "b")]

    seen = [await twins.ask("GET", path) for path in paths]
    await twins.drain()

    assert [await twins.ask("GET", path) for path in paths] == seen
    assert [child["id"] for child in seen[1].body["relatedRuns"]["children"]] == ["<a>", "<b>"]
    assert seen[0].body["metadata"] == {"x": 1}


REPLAYED: list[dict[str, Any]] = [{}, OPTIONS, {"delay": "1h", "tags": "a"}]


async def test_a_held_run_is_replayed_as_a_created_one_is(twins: Twins, subtests: pytest.Subtests) -> None:
    for options in REPLAYED:
        with subtests.test(str(options)):
            await twins.trigger("run", {"a": 1}, **options)
            await twins.ask("POST", f"{RUN}/tags", {"tags": "later"})

            await twins.ask("POST", f"{RUN}/replay", name="replay")
            await twins.ask(*CANCEL)
            await twins.ask("POST", f"{RUN}/replay", name="replay of a cancelled run")
            await twins.ask("POST", "/api/v1/runs/<replay>/replay", name="replay of a replay")

            paths = [f"/api/v3/runs/<replay{of}>" for of in ("", " of a cancelled run", " of a replay")]
            seen = [await twins.ask("GET", path) for path in paths]
            assert [run.body["tags"][-1] for run in seen] == ["later"] * 3
            await twins.drain()
            assert [await twins.ask("GET", path) for path in paths] == seen


async def test_a_key_answers_with_the_held_run_until_that_is_replayed_or_reset(twins: Twins) -> None:
    await twins.trigger("run", idempotencyKey="k")
    body = {"options": {"idempotencyKey": "k"}}

    again = await twins.ask("POST", "/api/v1/tasks/echo/trigger", body)
    await twins.ask("POST", f"{RUN}/replay", name="replay")
    after_replay = await twins.ask("POST", "/api/v1/tasks/echo/trigger", body)
    await twins.ask("POST", "/api/v1/idempotencyKeys/k/reset", {"taskIdentifier": "echo"})
    reset = await twins.ask("POST", "/api/v1/tasks/echo/trigger", body, "new")

    assert again.body == after_replay.body == {"id": "<run>", "isCached": True}
    assert reset.body == {"id": "<new>", "isCached": False}


async def test_integers_of_any_writing_make_the_same_runs_held_and_created_of_the_very_bytes(twins: Twins) -> None:
    body = b"""{"payload": {"n": 3000.0, "e": 3e3}, "options": {
        "metadata": {"n": 1.0}, "ttl": 3.6e3, "priority": 5.0, "maxAttempts": 1e1, "maxDuration": 60.0
    }}"""
    await twins.ask("POST", "/api/v1/tasks/echo/trigger", body, "run")
    await twins.ask("POST", "/api/v3/batches", b'{"runCount": 2.0}', "batch")
    lines = b'{"index": 1.0, "task": "echo", "payload": 1.0}\n{"index": 0e0, "task": "echo"}\n'
    added = await twins.ask("POST", "/api/v3/batches/<batch>/items", lines, kind="application/x-ndjson")

    assert added.body["sealed"]
    assert (await twins.ask("GET", "/api/v3/runs/<run>")).body["ttl"] == "1h"
    await twins.ask("GET", "/api/v2/batches/<batch>")
    for twin in (twins.created, twins.held):
        run = await twins.seen(twin, "/api/v3/runs/<run>")
        assert raw_member(run, "payload") == b'{"n": 3000.0, "e": 3e3}'
        assert raw_member(run, "metadata") == b'{"n": 1.0}'
        assert raw_member(await twins.seen(twin, "/api/v3/runs/<item 1>"), "payload") == b"1.0"
    bad = b'{"options": {"maxAttempts": 1.5, "priority": 1e99, "ttl": 0.5, "maxDuration": -1.0}}'
    refused = await twins.ask("POST", "/api/v1/tasks/echo/trigger", bad)
    assert [error["field"] for error in refused.body["errors"]] == [
        f"options.{name}" for name in ("ttl", "priority", "maxAttempts", "maxDuration")
    ]


# --- paths ---------------------------------------------------------------------------------------------------------


async def test_a_held_run_is_known_by_every_way_of_writing_its_id_and_by_no_other_id(twins: Twins) -> None:
    await twins.trigger("run", task="a/b c", delay="1h")
    ids = {
        "<run>": 200,
        "%72un%5F<after run_>": 200,
        "<run>%20": 404,
        "<run>%2F": 404,
        "<run>%00": 404,
        "<upper>": 404,
        "%2E%2E": 404,
        "<run>%FF": 422,
    }
    for twin in (twins.created, twins.held):
        run_id = twin.id("<run>")
        twin.call("<upper>", run_id.upper())
        twin.call("<after run_>", run_id.removeprefix("run_"))
    routes: list[Step] = [
        ("GET", "/api/v3/runs/{}", None),
        ("GET", "/api/v1/runs/{}/metadata", None),
        ("PUT", "/api/v1/runs/{}/metadata", {"metadata": {}}),
        ("POST", "/api/v1/runs/{}/tags", {"tags": "a"}),
        ("POST", "/api/v1/runs/{}/reschedule", {"delay": "2999-01-01"}),
        ("POST", "/api/v2/runs/{}/cancel", None),
        ("POST", "/api/v1/runs/{}/replay", None),
    ]
    for method, path, body in routes:
        for run_id, status in ids.items():
            name = "again" if path.endswith("replay") and status == 200 else None
            told = await twins.ask(method, path.format(run_id), body, name)
            assert told.status == status, (method, path, run_id)
    assert (await twins.ask("GET", "/api/v3/runs/<again>")).body["taskIdentifier"] == "a/b c"


# --- what is refused -----------------------------------------------------------------------------------------------

DEEP = b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1)
BAD_BODIES: list[tuple[Any, str]] = [
    (None, "application/json"),
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"[]", "application/json"),
    (b"null", "application/json"),
    (b"\xff", "application/json"),
    (b'{"tags": "\\ud800", "delay": "\\ud800", "metadata": "\\ud800"}', "application/json"),
    (b'{"metadata": %b}' % DEEP, "application/json"),
    (b"{}", "text/plain"),
]
TAGS: list[Any] = [None, 5, {}, [1], [""], "", "a\0", ["x" * 129], [*map(str, range(11))]]
DELAYS: list[Any] = [None, "", "soon", 5, [], "1h ", "2026-02-30", "9999999999w", "a\0"]
METADATA: list[Any] = [[], "{}", 5, {"a": "x" * 300_000}]
OPERATIONS: list[Any] = [
    {},
    [7],
    [{"type": "double"}],
    [{"type": "set"}],
    [{"type": "increment", "key": "text", "value": 1}],
    [{"type": "increment", "key": "n", "value": "1"}],
    [{"type": "increment", "key": "huge", "value": 1e308}],
    [{"type": "set", "key": "a", "value": 1}] * 1001,
]
BAD: dict[str, tuple[str, list[Any]]] = {
    "tags": ("POST", [{}, *({"tags": tags} for tags in TAGS)]),
    "reschedule": ("POST", [{}, *({"delay": delay} for delay in DELAYS)]),
    "metadata": (
        "PUT",
        [
            *({"metadata": metadata} for metadata in METADATA),
            *({"operations": operations} for operations in OPERATIONS),
            {"rootOperations": [{"type": "increment", "key": "text", "value": 1}], "metadata": {"a": 1}},
        ],
    ),
}


async def test_a_bad_body_is_refused_for_a_held_run_in_the_same_words_and_changes_nothing(
    twins: Twins, subtests: pytest.Subtests
) -> None:
    await twins.trigger("run", delay="1h", tags="a", metadata={"text": "x", "n": 1, "huge": 1e308})
    before = await read(twins)
    for route, (method, bodies) in BAD.items():
        for body, kind in [*BAD_BODIES, *((body, "application/json") for body in bodies)]:
            with subtests.test(route, body=str(body)[:50]):
                told = await twins.ask(method, f"{RUN}/{route}", body, kind=kind)
                assert told.status in (400, 415, 422), told
                assert told.body["errors"]
                assert await read(twins) == before
    await twins.drain()
    assert await read(twins) == before


# --- lists ---------------------------------------------------------------------------------------------------------

QUERIES = {
    "": 10,
    "filter[isTest]=true": 3,
    "filter[isTest]=false": 7,
    "filter[createdAt][period]=1h": 10,
    "filter[createdAt][period]=0s": 0,
    "filter[createdAt][from]=<moment>": 5,
    "filter[createdAt][to]=<moment>": 6,
    "filter[createdAt][to]=2026-01-01": 0,
    "filter[batch]=<batch>": 4,
    "filter[batch]=<batch>&filter[tag]=odd": 2,
    "filter[batch]=batch_none": 0,
    "filter[status]=QUEUED": 8,
    "filter[status]=DELAYED,CANCELED": 2,
    "filter[tag]=odd&filter[tag]=red": 5,
    "filter[taskIdentifier]=a/b c": 2,
    "filter[taskIdentifier]=a/b c&filter[isTest]=true": 1,
}


async def populate(twins: Twins) -> None:
    """Make ten runs; every other one passes the gate for both, the others are held for one."""
    singles: list[tuple[str, dict[str, Any]]] = [
        ("echo", {"test": True, "tags": "red"}),
        ("echo", {"tags": ["red", "odd"]}),
        ("a/b c", {"test": True}),
        ("a/b c", {}),
        ("echo", {"delay": "1h"}),
        ("echo", {"test": True, "tags": "odd"}),
    ]
    items = [{"task": "echo", "payload": n, "options": {"tags": "odd" if n % 2 else "even"}} for n in range(4)]
    for number, (task, options) in enumerate(singles):
        await (twins.calm() if number % 2 else twins.hold())
        path = f"/api/v1/tasks/{quote(task, safe='')}/trigger"
        await twins.ask("POST", path, {"options": options}, f"run {number}")
    for twin in (twins.created, twins.held):
        twin.call("<moment>", (await twins.seen(twin, "/api/v3/runs/<run 5>")).json()["createdAt"], told=False)
    await twins.hold()
    await twins.ask("POST", "/api/v2/tasks/batch", {"items": items}, "batch")
    await twins.ask("POST", "/api/v2/runs/<run 5>/cancel")
    await twins.ask("GET", "/api/v2/batches/<batch>")


async def turn_pages(twins: Twins, query: str, drained: int) -> list[Told]:
    """Turn all pages of a list and back again, with so many runs created at every turn; return those that lead forward."""
    path = f"/api/v1/runs?page[size]=2&{query}"
    pages = [await twins.ask("GET", path)]
    while "next" in pages[-1].body["pagination"]:
        await twins.drain(drained)
        pages.append(await twins.ask("GET", f"{path}&page[after]=<next>"))
    back = [pages[-1]]
    while "previous" in back[-1].body["pagination"]:
        await twins.drain(drained)
        back.append(await twins.ask("GET", f"{path}&page[before]=<previous>"))
    assert [page.body["data"] for page in back[::-1]] == [page.body["data"] for page in pages]
    return pages


async def test_every_filter_finds_held_runs_page_by_page(twins: Twins, subtests: pytest.Subtests) -> None:
    await populate(twins)
    for query, expected in QUERIES.items():
        with subtests.test(query):
            pages = await turn_pages(twins, query, drained=0)
            assert sum(len(page.body["data"]) for page in pages) == expected
    assert await twins.drain() > 0


@pytest.mark.parametrize("query", ["", "filter[tag]=odd,red", "filter[isTest]=false&filter[createdAt][period]=1h"])
async def test_pages_stay_the_same_while_held_runs_are_created(twins: Twins, query: str) -> None:
    await populate(twins)
    before = await turn_pages(twins, query, drained=0)

    assert await turn_pages(twins, query, drained=1) == before

    await twins.drain()
    assert await turn_pages(twins, query, drained=0) == before
    await twins.ask("GET", "/api/v2/batches/<batch>")


# --- ends ----------------------------------------------------------------------------------------------------------


async def test_a_held_run_that_expires_reads_as_a_created_one_that_expired(twins: Twins, database: Database) -> None:
    await twins.trigger("run", {"a": 1}, ttl=1, idempotencyKey="k", tags="a")
    at = datetime.fromisoformat(
        (await twins.seen(twins.created, "/api/v3/runs/<run>")).json()["createdAt"]
    ) + timedelta(seconds=1)
    await Upkeep(database, lambda: at).advance()

    async def has_expired() -> bool:
        return (await twins.seen(twins.held, "/api/v3/runs/<run>")).json()["status"] == "EXPIRED"

    await until(has_expired)
    seen = [*await read(twins), await twins.ask("GET", "/api/v1/runs?filter[status]=EXPIRED")]

    assert seen[0].body["error"]
    assert seen[1].body["ok"] is False
    assert len(seen[-1].body["data"]) == 1
    for method, path, body in (
        CANCEL,
        ("POST", f"{RUN}/tags", {"tags": "b"}),
        ("PUT", f"{RUN}/metadata", {"metadata": {"b": 1}}),
        ("POST", f"{RUN}/reschedule", {"delay": "1h"}),
    ):
        await twins.ask(method, path, body)
        await read(twins)
    await twins.ask("POST", f"{RUN}/replay", name="replay")
    await twins.ask("GET", "/api/v3/runs/<replay>")
    again = await twins.ask("POST", "/api/v1/tasks/echo/trigger", {"options": {"idempotencyKey": "k"}}, "new")
    assert again.body == {"id": "<new>", "isCached": False}
    seen = await read(twins)
    await twins.drain()
    assert await read(twins) == seen
