"""The run API: reading, listing and changing runs, within one environment."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from mollifier.cursors import cursor_at
from mollifier.model import RunError, Tenant
from mollifier.postgres.database import Database
from tests.http.conftest import Api, bearer, change_run, fields_of, raw_member

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
WITH_NUL = cursor_at(MOMENT, "run_\0")


async def put(api: Api, tenant: Tenant, run_id: str, body: Any) -> Any:
    return await api.client.put(f"/api/v1/runs/{run_id}/metadata", json=body, headers=bearer(tenant))


# --- reading -------------------------------------------------------------------------------------------------------


async def test_a_run_reads_as_the_wire_format_has_it(api: Api, tenant: Tenant) -> None:
    run = await api.run(tenant, await api.triggered(tenant, {"a": 1}))
    assert set(run) == {
        *(
            "id",
            "status",
            "taskIdentifier",
            "isQueued",
            "isExecuting",
            "isWaiting",
            "isCompleted",
            "isSuccess",
            "isFailed",
        ),
        *(
            "isCancelled",
            "isTest",
            "createdAt",
            "updatedAt",
            "tags",
            "costInCents",
            "baseCostInCents",
            "durationMs",
            "depth",
        ),
        *("triggerFunction", "relatedRuns", "attemptCount", "payload"),
    }
    assert (run["status"], run["isQueued"], run["isCompleted"], run["attemptCount"]) == ("QUEUED", True, False, 0)
    assert datetime.fromisoformat(run["createdAt"]).utcoffset() == timedelta(0)
    assert run["relatedRuns"] == {}


STATUSES: list[tuple[str, set[str]]] = [
    ("PENDING_VERSION", {"isQueued"}),
    ("DEQUEUED", {"isExecuting"}),
    ("EXECUTING", {"isExecuting"}),
    ("WAITING", {"isWaiting"}),
    ("COMPLETED", {"isCompleted", "isSuccess"}),
    ("CANCELED", {"isCompleted", "isCancelled"}),
    ("TIMED_OUT", {"isCompleted", "isFailed"}),
]


async def test_the_status_is_told_in_flags_too(
    api: Api, tenant: Tenant, database: Database, subtests: pytest.Subtests
) -> None:
    run_id = await api.triggered(tenant)
    told = ("isQueued", "isExecuting", "isWaiting", "isCompleted", "isSuccess", "isFailed", "isCancelled")
    for status, flags in STATUSES:
        with subtests.test(status):
            await change_run(database, run_id, status=status)
            run = await api.run(tenant, run_id)
            assert {name for name in told if run[name]} == flags


async def test_a_run_shows_the_runs_it_came_from_and_led_to(api: Api, tenant: Tenant) -> None:
    root = await api.triggered(tenant)
    child = await api.triggered(tenant, parentRunId=root)
    grandchild = await api.triggered(tenant, parentRunId=child, resumeParentOnCompletion=True)
    related = (await api.run(tenant, child))["relatedRuns"]
    assert (related["root"]["id"], related["parent"]["id"]) == (root, root)
    assert [one["id"] for one in related["children"]] == [grandchild]
    run = await api.run(tenant, grandchild)
    assert (run["depth"], run["triggerFunction"]) == (2, "triggerAndWait")
    assert run["relatedRuns"]["root"]["id"] == root


async def test_output_and_error_read_as_the_values_they_stand_for(api: Api, tenant: Tenant, database: Database) -> None:
    done, failed = await api.triggered(tenant), await api.triggered(tenant)
    times = {"started_at": MOMENT, "finished_at": MOMENT + timedelta(seconds=2), "attempt_count": 1}
    await change_run(database, done, status="COMPLETED", output=b'{"n":1e309}', **times)
    error = msgspec.json.encode(RunError(message="boom", name="ValueError", stack_trace="line 1"))
    await change_run(database, failed, status="FAILED", error=error, **times)
    answer = await api.get(tenant, f"/api/v3/runs/{done}")
    assert raw_member(answer, "output") == b'{"n":1e309}'
    assert raw_member(answer, "durationMs") == b"2000"
    run = await api.run(tenant, failed)
    assert run["error"] == {"message": "boom", "name": "ValueError", "stackTrace": "line 1"}


async def test_a_result_is_there_once_the_run_has_ended(api: Api, tenant: Tenant, database: Database) -> None:
    run_id = await api.triggered(tenant)
    path = f"/api/v1/runs/{run_id}/result"
    assert (await api.get(tenant, path)).status_code == 404
    await change_run(database, run_id, status="COMPLETED", output=b'{"n": 1}')
    expected = {
        "ok": True,
        "id": run_id,
        "taskIdentifier": "echo",
        "output": '{"n": 1}',
        "outputType": "application/json",
    }
    assert (await api.get(tenant, path)).json() == expected
    await change_run(database, run_id, status="FAILED", error=msgspec.json.encode(RunError(message="boom", name="E")))
    error = (await api.get(tenant, path)).json()["error"]
    assert error == {"type": "BUILT_IN_ERROR", "name": "E", "message": "boom", "stackTrace": ""}


# --- one environment -----------------------------------------------------------------------------------------------

ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/v3/runs/{}", None),
    ("GET", "/api/v1/runs/{}/result", None),
    ("POST", "/api/v2/runs/{}/cancel", {}),
    ("POST", "/api/v1/runs/{}/tags", {"tags": ["x"]}),
    ("GET", "/api/v1/runs/{}/metadata", None),
    ("PUT", "/api/v1/runs/{}/metadata", {"metadata": {"a": 1}}),
    ("POST", "/api/v1/runs/{}/reschedule", {"delay": "1h"}),
    ("POST", "/api/v1/runs/{}/replay", {}),
]


async def test_a_run_of_another_environment_does_not_exist(
    api: Api, tenant: Tenant, neighbour: Tenant, subtests: pytest.Subtests
) -> None:
    run_id = await api.triggered(neighbour, delay="1h")
    before = await api.run(neighbour, run_id)
    for method, path, body in ROUTES:
        for name in (run_id, "run_nobody", "%00", "r" * 300, "a%2Fb"):
            with subtests.test(path, name=name):
                answer = await api.client.request(method, path.format(name), json=body, headers=bearer(tenant))
                assert (answer.status_code, fields_of(answer)) == (404, ["runId"])
    assert (await api.get(tenant, "/api/v1/runs")).json()["data"] == []
    assert await api.run(neighbour, run_id) == before


async def test_no_route_answers_without_a_key(api: Api, subtests: pytest.Subtests) -> None:
    others: list[tuple[str, str, Any]] = [
        ("GET", "/api/v1/runs", None),
        ("POST", "/api/v1/idempotencyKeys/k/reset", {}),
    ]
    for method, path, body in [*ROUTES, *others]:
        with subtests.test(path):
            assert (await api.client.request(method, path.format("x"), json=body)).status_code == 401


async def test_no_body_is_taken_unchecked(api: Api, tenant: Tenant, subtests: pytest.Subtests) -> None:
    run_id = await api.triggered(tenant)
    bodies = [(b"{", "application/json", 400), (b"[]", "application/json", 422), (b"{}", "text/plain", 415)]
    reset: tuple[str, str, Any] = ("POST", "/api/v1/idempotencyKeys/k/reset", {})
    for method, path, body in [*ROUTES, reset]:
        for content, content_type, status in bodies if body is not None else []:
            with subtests.test(path, content=content):
                headers = {**bearer(tenant), "content-type": content_type}
                answer = await api.client.request(method, path.format(run_id), content=content, headers=headers)
                assert answer.status_code == status


# --- lists ---------------------------------------------------------------------------------------------------------


async def test_lists_are_newest_first_and_turn_pages_both_ways(api: Api, tenant: Tenant) -> None:
    run_ids = [await api.triggered(tenant, n) for n in range(5)][::-1]
    query = {"page[size]": 2}
    first = (await api.get(tenant, "/api/v1/runs", **query)).json()
    second = (await api.get(tenant, "/api/v1/runs", **query, **{"page[after]": first["pagination"]["next"]})).json()
    back = (await api.get(tenant, "/api/v1/runs", **query, **{"page[before]": second["pagination"]["previous"]})).json()
    assert [run["id"] for run in first["data"] + second["data"]] == run_ids[:4]
    assert back["data"] == first["data"]
    assert "previous" not in first["pagination"]
    assert first["data"][0]["env"] == {"id": tenant.env_id, "name": "prod"}
    assert "payload" not in first["data"][0]


async def test_lists_are_filtered(api: Api, tenant: Tenant, database: Database, subtests: pytest.Subtests) -> None:
    a = await api.triggered(tenant, tags=["red", "blue"], test=True)
    b = await api.triggered(tenant, tags="green", parentBatch="batch_1")
    answer = await api.trigger(tenant, task="a%2Fb%20c")
    c = answer.json()["id"]
    await change_run(database, a, status="COMPLETED", created_at=MOMENT)
    queries: list[tuple[Any, set[str]]] = [
        ({}, {a, b, c}),
        ({"filter[status]": "QUEUED"}, {b, c}),
        ({"filter[status]": "COMPLETED,QUEUED"}, {a, b, c}),
        ([("filter[status]", "COMPLETED"), ("filter[status]", "FAILED")], {a}),
        ({"filter[taskIdentifier]": "a/b c,nobody"}, {c}),
        ({"filter[tag]": "blue,green"}, {a, b}),
        ({"filter[isTest]": "true"}, {a}),
        ({"filter[isTest]": "false"}, {b, c}),
        ({"filter[batch]": "batch_1"}, {b}),
        ({"filter[createdAt][period]": "1h"}, {b, c}),
        ({"filter[createdAt][to]": "2026-01-02"}, {a}),
        ({"filter[createdAt][from]": str(int(MOMENT.timestamp() * 1000) + 1)}, {b, c}),
        ({"filter[unknown]": "x", "page[size]": "100", "filter[tag]": ""}, {a, b, c}),
    ]
    for query, expected in queries:
        with subtests.test(str(query)):
            found = await api.client.get("/api/v1/runs", params=query, headers=bearer(tenant))
            assert {run["id"] for run in found.json()["data"]} == expected


async def test_a_list_cannot_be_asked_for_what_is_not(api: Api, tenant: Tenant, subtests: pytest.Subtests) -> None:
    bad: list[tuple[str, str, str]] = [
        ("page[size]", "0", "page[size]"),
        ("page[size]", "101", "page[size]"),
        ("page[size]", "ten", "page[size]"),
        ("page[size]", "10.0", "page[size]"),
        ("page[size]", "٣", "page[size]"),
        ("page[after]", "nonsense", "page[after]"),
        ("page[before]", "x" * 600, "page[before]"),
        ("page[after]", WITH_NUL, "page[after]"),
        ("page[before]", WITH_NUL, "page[before]"),
        ("filter[status]", "SLEEPING", "filter[status]"),
        ("filter[isTest]", "maybe", "filter[isTest]"),
        ("filter[tag]", "a\0b", "filter[tag]"),
        ("filter[taskIdentifier]", "\0", "filter[taskIdentifier]"),
        ("filter[createdAt][from]", "yesterday", "filter[createdAt][from]"),
        ("filter[createdAt][to]", "9" * 40, "filter[createdAt][to]"),
        ("filter[createdAt][period]", "1 day", "filter[createdAt][period]"),
    ]
    for name, value, field in bad:
        with subtests.test(name, value=value[:20]):
            answer = await api.get(tenant, "/api/v1/runs", **{name: value})
            assert (answer.status_code, fields_of(answer)) == (422, [field])


# --- changes -------------------------------------------------------------------------------------------------------


async def test_cancelling_twice_is_cancelling_once(api: Api, tenant: Tenant) -> None:
    run_id = await api.triggered(tenant)
    for _ in range(2):
        answer = await api.client.post(f"/api/v2/runs/{run_id}/cancel", headers=bearer(tenant))
        assert (answer.status_code, answer.json()) == (200, {"id": run_id})
    assert (await api.run(tenant, run_id))["status"] == "CANCELED"


async def test_tags_are_added_up_to_ten_in_all(api: Api, tenant: Tenant) -> None:
    run_id = await api.triggered(tenant, tags=["a"])
    path = f"/api/v1/runs/{run_id}/tags"
    assert (await api.post(tenant, path, {"tags": ["a", "b"]})).status_code == 200
    assert (await api.post(tenant, path, {"tags": "c"})).status_code == 200
    answer = await api.post(tenant, path, {"tags": [str(n) for n in range(8)]})
    assert (answer.status_code, fields_of(answer)) == (422, ["tags"])
    bad: list[Any] = [None, [1], [""], ["x" * 129], {}, [str(n) for n in range(11)]]
    for tags in bad:
        assert (await api.post(tenant, path, {"tags": tags})).status_code == 422
    assert (await api.run(tenant, run_id))["tags"] == ["a", "b", "c"]


async def test_a_delayed_run_is_rescheduled(api: Api, tenant: Tenant) -> None:
    run_id = await api.triggered(tenant, delay="1h")
    answer = await api.post(tenant, f"/api/v1/runs/{run_id}/reschedule", {"delay": "2030-01-31T12:00:00Z"})
    assert (answer.status_code, answer.json()["delayedUntil"]) == (200, "2030-01-31T12:00:00Z")
    assert answer.json()["status"] == "DELAYED"


async def test_only_a_delayed_run_is_rescheduled_and_only_to_a_delay(api: Api, tenant: Tenant) -> None:
    queued, delayed = await api.triggered(tenant), await api.triggered(tenant, delay="1h")
    answer = await api.post(tenant, f"/api/v1/runs/{queued}/reschedule", {"delay": "1h"})
    assert (answer.status_code, fields_of(answer)) == (409, ["delay"])
    for body in ({}, {"delay": None}, {"delay": "soon"}, {"delay": 5}):
        answer = await api.post(tenant, f"/api/v1/runs/{delayed}/reschedule", body)
        assert (answer.status_code, fields_of(answer)) == (422, ["delay"])


async def test_a_replay_is_a_new_run_of_the_same_without_its_keys(api: Api, tenant: Tenant) -> None:
    options = {
        "tags": ["a"],
        "idempotencyKey": "order-1",
        "delay": "1h",
        "metadata": {"m": 1},
        "test": True,
        "ttl": "1h",
    }
    run_id = await api.triggered(tenant, {"a": 1}, **options)
    answer = await api.post(tenant, f"/api/v1/runs/{run_id}/replay")
    assert answer.status_code == 200
    assert answer.json()["id"] != run_id
    run = await api.run(tenant, answer.json()["id"])
    assert {name: run[name] for name in ("payload", "tags", "metadata", "isTest", "ttl", "status")} == {
        "payload": {"a": 1},
        "tags": ["a"],
        "metadata": {"m": 1},
        "isTest": True,
        "ttl": "1h",
        "status": "QUEUED",
    }
    assert "idempotencyKey" not in run


async def test_a_key_is_reset_for_its_task(api: Api, tenant: Tenant) -> None:
    first = await api.triggered(tenant, idempotencyKey="order/1 ä")
    path = "/api/v1/idempotencyKeys/order%2F1%20%C3%A4/reset"
    assert (await api.post(tenant, path, {"taskIdentifier": "other"})).status_code == 404
    answer = await api.post(tenant, path, {"taskIdentifier": "echo"})
    assert (answer.status_code, answer.json()) == (200, {"id": "order/1 ä"})
    assert await api.triggered(tenant, idempotencyKey="order/1 ä") != first


async def test_a_key_is_not_reset_without_the_task_nor_in_another_environment(
    api: Api, tenant: Tenant, neighbour: Tenant
) -> None:
    first = await api.triggered(tenant, idempotencyKey="k")
    answer = await api.post(tenant, "/api/v1/idempotencyKeys/k/reset", {})
    assert (answer.status_code, fields_of(answer)) == (422, ["taskIdentifier"])
    assert (await api.post(neighbour, "/api/v1/idempotencyKeys/k/reset", {"taskIdentifier": "echo"})).status_code == 404
    assert (await api.post(tenant, "/api/v1/idempotencyKeys/%00/reset", {"taskIdentifier": "echo"})).status_code == 422
    assert await api.triggered(tenant, idempotencyKey="k") == first


# --- metadata ------------------------------------------------------------------------------------------------------


async def test_metadata_is_replaced_and_then_changed_by_operations(api: Api, tenant: Tenant) -> None:
    run_id = await api.triggered(tenant)
    assert (await api.get(tenant, f"/api/v1/runs/{run_id}/metadata")).json() == {"metadata": {}}
    body = {
        "metadata": {"n": 1, "list": [1, 2, 1]},
        "operations": [
            {"type": "increment", "key": "n", "value": 2},
            {"type": "append", "key": "list", "value": {"x": None}},
            {"type": "remove", "key": "list", "value": 1},
            {"type": "set", "key": "nul\0", "value": "a\0b"},
            {"type": "set", "key": "gone", "value": None},
            {"type": "delete", "key": "gone"},
        ],
    }
    answer = await put(api, tenant, run_id, body)
    expected = {"n": 3, "list": [2, {"x": None}], "nul\0": "a\0b"}
    assert (answer.status_code, answer.json()) == (200, {"metadata": expected})
    assert (await api.run(tenant, run_id))["metadata"] == expected
    assert (await put(api, tenant, run_id, {})).json() == {"metadata": expected}


async def test_concurrent_operations_never_lose_one(api: Api, tenant: Tenant) -> None:
    run_id = await api.triggered(tenant)
    body = {"operations": [{"type": "increment", "key": "n", "value": 1}, {"type": "append", "key": "l", "value": 1}]}
    await asyncio.gather(*(put(api, tenant, run_id, body) for _ in range(20)))
    metadata = (await api.get(tenant, f"/api/v1/runs/{run_id}/metadata")).json()["metadata"]
    assert metadata == {"n": 20, "l": [1] * 20}


async def test_operations_reach_the_parent_and_the_root(api: Api, tenant: Tenant) -> None:
    root = await api.triggered(tenant)
    parent = await api.triggered(tenant, parentRunId=root)
    child = await api.triggered(tenant, parentRunId=parent)
    change = [{"type": "increment", "key": "n", "value": 1}]
    answer = await put(api, tenant, child, {"parentOperations": change, "rootOperations": change})
    assert answer.json() == {"metadata": {}}
    assert (await api.run(tenant, parent))["metadata"] == {"n": 1}
    assert (await api.run(tenant, root))["metadata"] == {"n": 1}
    alone = await put(api, tenant, root, {"parentOperations": change, "rootOperations": change})
    assert alone.json() == {"metadata": {"n": 3}}


BAD_CHANGES: list[tuple[Any, str]] = [
    ({"metadata": []}, "metadata"),
    ({"metadata": "{}"}, "metadata"),
    ({"operations": {}}, "operations"),
    ({"operations": [7]}, "operations[0]"),
    ({"operations": [{"key": "a", "value": 1}]}, "operations[0].type"),
    ({"operations": [{"type": "double", "key": "a"}]}, "operations[0].type"),
    ({"operations": [{"type": "set", "value": 1}]}, "operations[0].key"),
    ({"operations": [{"type": "set", "key": 1, "value": 1}]}, "operations[0].key"),
    ({"operations": [{"type": "set", "key": "a"}]}, "operations[0].value"),
    ({"operations": [{"type": "update", "value": []}]}, "operations[0].value"),
    ({"operations": [{"type": "increment", "key": "a", "value": "1"}]}, "operations[0].value"),
    ({"operations": [{"type": "increment", "key": "text", "value": 1}]}, "operations[0].key"),
    ({"parentOperations": [{"type": "increment", "key": "text", "value": 1}]}, "parentOperations[0].key"),
    (
        {
            "operations": [{"type": "set", "key": "a", "value": 1}],
            "rootOperations": [{"type": "increment", "key": "text", "value": 1}],
        },
        "rootOperations[0].key",
    ),
]


async def test_a_change_that_cannot_be_changes_nothing(api: Api, tenant: Tenant, subtests: pytest.Subtests) -> None:
    run_id = await api.triggered(tenant, metadata={"text": "x"})
    for body, field in BAD_CHANGES:
        with subtests.test(str(body)):
            answer = await put(api, tenant, run_id, body)
            assert (answer.status_code, fields_of(answer)) == (422, [field])
    assert (await api.run(tenant, run_id))["metadata"] == {"text": "x"}
