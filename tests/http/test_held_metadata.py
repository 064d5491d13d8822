"""Metadata over HTTP, of runs that are held and of runs that are created: a request changes all that it names, or nothing."""

from __future__ import annotations

from typing import Any

import pytest

from mollifier.metadata import METADATA_BYTES_MAX
from tests.http.conftest import Diverting, fields_of

pytestmark = pytest.mark.leaves_keys

Operation = dict[str, Any]


def set_to(key: str, value: Any) -> Operation:
    return {"type": "set", "key": key, "value": value}


def increment(key: str) -> Operation:
    return {"type": "increment", "key": key, "value": 1}


STORES = ("created", "held")


async def change(diverting: Diverting, run_id: str, body: Any) -> Any:
    return await diverting.put(f"/api/v1/runs/{run_id}/metadata", body)


async def metadata(diverting: Diverting, run_id: str) -> Any:
    return (await diverting.get(f"/api/v1/runs/{run_id}/metadata")).json()["metadata"]


async def test_a_request_of_which_one_part_cannot_be_applied_changes_nothing(
    diverting: Diverting, subtests: pytest.Subtests
) -> None:
    for store in STORES:
        with subtests.test(store):
            run_id = await diverting.either(store)
            body = {"parentOperations": [set_to("k", "x")], "operations": [increment("k")]}

            answer = await change(diverting, run_id, body)

            assert (answer.status_code, fields_of(answer)) == (422, ["operations[0].key"])
            assert await metadata(diverting, run_id) == {}


async def test_all_that_a_request_asks_of_one_run_is_applied_in_order(
    diverting: Diverting, subtests: pytest.Subtests
) -> None:
    for store in STORES:
        with subtests.test(store):
            run_id = await diverting.either(store)
            body = {
                "operations": [increment("n"), {"type": "append", "key": "l", "value": "own"}],
                "rootOperations": [increment("n"), {"type": "append", "key": "l", "value": "root"}],
                "parentOperations": [set_to("n", 5), {"type": "append", "key": "l", "value": "parent"}],
            }

            answer = await change(diverting, run_id, body)

            assert answer.json() == {"metadata": {"n": 7, "l": ["parent", "root", "own"]}}
            assert await metadata(diverting, run_id) == answer.json()["metadata"]


async def test_parents_and_roots_that_are_one_run_are_changed_once(
    diverting: Diverting, subtests: pytest.Subtests
) -> None:
    for store in STORES:
        with subtests.test(store):
            parent = await diverting.either(store)
            child = await diverting.either(store, parentRunId=parent)
            bad = {"parentOperations": [set_to("k", "x")], "rootOperations": [set_to("a", 1), increment("k")]}
            good = {
                "parentOperations": [set_to("k", 1)],
                "rootOperations": [increment("k")],
                "operations": [increment("k")],
            }

            answer = await change(diverting, child, bad)
            assert (answer.status_code, fields_of(answer)) == (422, ["rootOperations[1].key"])
            assert [await metadata(diverting, run_id) for run_id in (parent, child)] == [{}, {}]

            assert (await change(diverting, child, good)).json() == {"metadata": {"k": 1}}
            assert await metadata(diverting, parent) == {"k": 2}


async def test_an_operation_that_fails_after_a_replacement_is_named_as_the_body_has_it(
    diverting: Diverting, subtests: pytest.Subtests
) -> None:
    for store in STORES:
        with subtests.test(store):
            run_id = await diverting.either(store)

            answer = await change(
                diverting, run_id, {"metadata": {"k": "x"}, "operations": [set_to("a", 1), increment("k")]}
            )

            assert (answer.status_code, fields_of(answer)) == (422, ["operations[1].key"])
            assert await metadata(diverting, run_id) == {}


async def test_operations_that_make_metadata_too_large_together_change_nothing(
    diverting: Diverting, subtests: pytest.Subtests
) -> None:
    for store in STORES:
        with subtests.test(store):
            run_id = await diverting.either(store)
            half = "x" * (METADATA_BYTES_MAX // 2)

            answer = await change(
                diverting, run_id, {"parentOperations": [set_to("a", half)], "rootOperations": [set_to("b", half)]}
            )

            assert (answer.status_code, fields_of(answer)) == (422, ["rootOperations"])
            assert await metadata(diverting, run_id) == {}


async def test_operations_reach_a_held_parent_of_a_created_run_and_a_created_root_of_a_held_one(
    diverting: Diverting,
) -> None:
    root = await diverting.created()
    parent = await diverting.held(parentRunId=root)
    child = await diverting.created(parentRunId=parent)

    answer = await change(
        diverting,
        child,
        {
            "operations": [set_to("of", "child")],
            "parentOperations": [increment("n")],
            "rootOperations": [increment("n")],
        },
    )

    assert answer.json() == {"metadata": {"of": "child"}}
    assert [await metadata(diverting, run_id) for run_id in (root, parent)] == [{"n": 1}, {"n": 1}]
    await diverting.drain()
    assert [await metadata(diverting, run_id) for run_id in (root, parent)] == [{"n": 1}, {"n": 1}]
