"""The admin API's dead letters: what died in the buffer, listed, read, replayed and deleted."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any

from litestar import Request, Response, delete, get, post
from litestar.params import Parameter

from mollifier import dead_letters
from mollifier.cursors import as_us, cursor_at, from_us, place_of
from mollifier.dead_letters import Outcome, Refused
from mollifier.errors import (
    BufferUnavailableError,
    ConflictError,
    FieldError,
    InvalidRequestError,
    NotFoundError,
)
from mollifier.fields import Fields, text_fault
from mollifier.http.bodies import nothing, parsed
from mollifier.http.buffer import LIMIT, LIMIT_DEFAULT, buffer_of, query_number
from mollifier.http.letter_bodies import (
    Deleted,
    LetterBody,
    LetterDetails,
    LetterList,
    LetterPagination,
    RefusedBody,
    Replayed,
    known,
)
from mollifier.http.openapi import documented
from mollifier.http.raw_path import ID_LENGTH_MAX, path_id
from mollifier.http.render import json_response
from mollifier.http.schemas import RUN_IDS_MAX, RunIdsBody
from mollifier.http.services import services_of
from mollifier.letters import Letter, LetterPlace, shown_payload

_CURSOR_LENGTH_MAX = 1024

AnyRequest = Request[Any, Any, Any]
RunId = Annotated[str, Parameter(description="The run's id")]


@get(
    "/dead-letters",
    summary="List dead letters",
    operation_class=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, key="adminToken"),
)
async def list_dead_letters(
    request: AnyRequest,
    org: Annotated[str | None, Parameter(description="Of this organization only")] = None,
    env: Annotated[str | None, Parameter(description="Of this environment only")] = None,
    limit: Annotated[str | None, Parameter(description="How many, 1 to 1000; 100 by default")] = None,
    after: Annotated[str | None, Parameter(description="The cursor `pagination.next` of the page before")] = None,
) -> Response[LetterList]:
    """List what died in the buffer, newest first, without payloads. With `org` or `env` a page may be short and have a next one."""
    page = await buffer_of(services_of(request)).list_letters(
        org_id=_id("org", org),
        env_id=_id("env", env),
        beyond=_place(after),
        limit=query_number("limit", limit, LIMIT_DEFAULT, *LIMIT),
    )
    further = None if page.next is None else cursor_at(from_us(page.next.died_at_ms * 1000), page.next.run_id)
    return json_response(
        LetterList([LetterBody(**known(letter)) for letter in page.letters], LetterPagination(further))
    )


@get(
    "/dead-letters/{runId:str}",
    summary="Read a dead letter",
    operation_class=documented(HTTPStatus.NOT_FOUND, key="adminToken"),
)
async def get_dead_letter(request: AnyRequest, runId: RunId) -> Response[LetterDetails]:
    """Read one dead letter, with its payload."""
    run_id = _run(runId)
    letter = await buffer_of(services_of(request)).get_letter(run_id)
    if letter is None:
        raise NotFoundError("dead letter", run_id, "runId")
    return json_response(LetterDetails(**known(letter), **shown_payload(letter)))


@post(
    "/dead-letters/{runId:str}/replay",
    status_code=200,
    summary="Replay a dead letter",
    operation_class=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, key="adminToken"),
)
async def replay_dead_letter(request: AnyRequest, runId: RunId) -> Response[LetterBody]:
    """Queue it again, in its place and with all of its attempts; the answer says what it was.

    Where its run exists by now it makes no second one; where its idempotency key is another run's by now, its run is created CANCELED
    and names that one.
    """
    await nothing(request)
    (outcome,) = await dead_letters.replay_many(buffer_of(services_of(request)), [_run(runId)])
    return json_response(LetterBody(**known(_done(outcome))))


@delete(
    "/dead-letters/{runId:str}",
    status_code=200,
    summary="Delete a dead letter",
    operation_class=documented(HTTPStatus.NOT_FOUND, key="adminToken"),
)
async def delete_dead_letter(request: AnyRequest, runId: RunId) -> Response[LetterBody]:
    """Drop it for good with all that is left of its entry: its trigger never becomes a run. The answer says what it was."""
    (outcome,) = await dead_letters.delete_many(buffer_of(services_of(request)), [_run(runId)])
    return json_response(LetterBody(**known(_done(outcome))))


@post(
    "/dead-letters/replay",
    status_code=200,
    summary="Replay dead letters",
    operation_class=documented(
        HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, body=RunIdsBody, key="adminToken"
    ),
)
async def replay_dead_letters(request: AnyRequest) -> Response[Replayed]:
    """Queue the named ones again, each by itself. For all of them, list them and name what the pages show."""
    run_ids = await parsed(request, _run_ids)
    outcomes = await dead_letters.replay_many(buffer_of(services_of(request)), run_ids)
    return json_response(Replayed(*_sorted(run_ids, outcomes)))


@post(
    "/dead-letters/delete",
    status_code=200,
    summary="Delete dead letters",
    operation_class=documented(
        HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, body=RunIdsBody, key="adminToken"
    ),
)
async def delete_dead_letters(request: AnyRequest) -> Response[Deleted]:
    """Drop the named ones for good, each by itself. What is not named stays, so nothing goes that nobody has seen."""
    run_ids = await parsed(request, _run_ids)
    outcomes = await dead_letters.delete_many(buffer_of(services_of(request)), run_ids)
    return json_response(Deleted(*_sorted(run_ids, outcomes)))


DEAD_LETTER_ROUTES = (
    *(list_dead_letters, get_dead_letter, replay_dead_letter, delete_dead_letter),
    *(replay_dead_letters, delete_dead_letters),
)


def _run(segment: str) -> str:
    return path_id(segment, "dead letter", "runId")


def _id(name: str, text: str | None) -> str | None:
    if not text:
        return None
    if fault := text_fault(text, ID_LENGTH_MAX):
        raise InvalidRequestError(FieldError(name, fault))
    return text


def _place(cursor: str | None) -> LetterPlace | None:
    if not cursor:
        return None
    if fault := text_fault(cursor, _CURSOR_LENGTH_MAX):
        raise InvalidRequestError(FieldError("after", fault))
    moment, run_id = place_of(cursor, "after")
    return LetterPlace(as_us(moment) // 1000, run_id)


def _run_ids(body: Fields) -> Sequence[str]:
    return body.required("runIds", lambda name: body.texts(name, ID_LENGTH_MAX, RUN_IDS_MAX, least=1)) or ()


def _done(outcome: Outcome) -> Letter:
    """Return the letter about which that was done which was asked for. Raises what else became of it."""
    match outcome:
        case Refused(run_id=run_id, is_missing=True):
            raise NotFoundError("dead letter", run_id, "runId")
        case Refused(detail=detail):
            raise ConflictError(f"Not replayed: {detail}.", "runId")
        case BufferUnavailableError():
            raise outcome
        case _:
            return outcome


def _sorted(run_ids: Sequence[str], outcomes: Sequence[Outcome]) -> tuple[list[str], list[RefusedBody]]:
    done: list[str] = []
    refused: list[RefusedBody] = []
    for run_id, outcome in zip(run_ids, outcomes, strict=True):
        match outcome:
            case Refused(detail=detail):
                refused.append(RefusedBody(run_id, detail))
            case BufferUnavailableError():
                refused.append(RefusedBody(run_id, f"the buffer's server refused: {outcome}"))
            case _:
                done.append(run_id)
    return done, refused
