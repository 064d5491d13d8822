"""Procrastinate's client, made to outlive its database.

Out of the box a worker stops, or silently stops sending heartbeats, when the database goes away for a moment. Here each of its
background queries survives that: fetching finds nothing, heartbeats wait for the next, settling a job repeats. And a job is
settled only by the worker that holds it: one that was taken for dead, and whose job went to another, leaves it alone.

A fetch whose answer is lost may have marked a job as this worker's all the same. Nobody else would ever take it, for this worker lives; so
it puts back, before it fetches again, what is marked as its own and was never handed to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import LiteralString

import psycopg
from procrastinate import exceptions, jobs, manager
from procrastinate.connector import BaseConnector

from mollifier.errors import EngineUnavailableError
from mollifier.postgres.background import Sleep, through_outage

OUTAGE_PAUSE_S = 1.0

_log = logging.getLogger(__name__)

_FINISH = "DELETE FROM procrastinate_jobs WHERE id = %(job_id)s AND worker_id = %(worker_id)s AND status = 'doing'"
_RETRY = """
    SELECT procrastinate_retry_job_v2(id, %(retry_at)s, NULL, NULL, NULL) FROM procrastinate_jobs
    WHERE id = %(job_id)s AND worker_id = %(worker_id)s AND status = 'doing' FOR UPDATE
"""
_PUT_BACK = """
    SELECT procrastinate_retry_job_v2(id, now(), NULL, NULL, NULL) FROM procrastinate_jobs
    WHERE worker_id = %(worker_id)s AND status = 'doing' AND id <> ALL (%(in_hand)s) FOR UPDATE
"""


class LastingJobManager(manager.JobManager):
    """A JobManager for workers, with the differences that the module tells of. Finished jobs are always deleted."""

    _sleep: Sleep = staticmethod(asyncio.sleep)

    def __init__(self, connector: BaseConnector) -> None:
        super().__init__(connector)
        self._in_hand: set[int] = set()
        self._has_missed_an_answer = False

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> jobs.Job | None:
        """Fetch a job; find none while the database cannot be reached."""
        try:
            if self._has_missed_an_answer:
                await self.connector.execute_query_async(_PUT_BACK, worker_id=worker_id, in_hand=list(self._in_hand))
                self._has_missed_an_answer = False
            job = await super().fetch_job(queues, worker_id)
        except exceptions.ConnectorException as error:
            if not _is_outage(error):
                raise
            self._has_missed_an_answer = True
            await self._sleep(OUTAGE_PAUSE_S)
            return None
        if job is not None and job.id is not None:
            self._in_hand.add(job.id)
        return job

    async def update_heartbeat(self, worker_id: int) -> None:
        """Send a sign of life, if there is somebody to send it to."""
        try:
            await super().update_heartbeat(worker_id)
        except exceptions.ConnectorException as error:
            if not _is_outage(error):
                raise
            fields = {"operation": "send a heartbeat", "error": str(error.__cause__)}
            _log.warning("mollifier.failing", extra={"fields": fields})

    async def listen_for_jobs(
        self, *, on_notification: manager.NotificationCallback, queues: Iterable[str] | None = None
    ) -> None:
        """Listen, anew after each outage; jobs that come meanwhile are found by polling."""
        while True:
            try:
                await super().listen_for_jobs(on_notification=on_notification, queues=queues)
                return
            except (exceptions.ConnectorException, psycopg.OperationalError) as error:
                if not _is_outage(error):
                    raise
                await self._sleep(OUTAGE_PAUSE_S)

    async def finish_job(self, job: jobs.Job, status: jobs.Status, delete_job: bool) -> None:  # noqa: ARG002, FBT001 - inherited
        """Delete the job, if it is still this worker's."""
        await self._settle(_FINISH, job, worker_id=job.worker_id)

    async def retry_job(
        self,
        job: jobs.Job,
        retry_at: datetime | None = None,
        priority: int | None = None,  # noqa: ARG002 - inherited
        queue: str | None = None,  # noqa: ARG002 - inherited
        lock: str | None = None,  # noqa: ARG002 - inherited
    ) -> None:
        """Put the job back, if it is still this worker's."""
        at = retry_at or datetime.now(UTC)
        await self._settle(_RETRY, job, worker_id=job.worker_id, retry_at=at)

    async def _settle(self, query: LiteralString, job: jobs.Job, **arguments: object) -> None:
        async def attempt() -> None:
            try:
                await self.connector.execute_query_async(query, job_id=job.id, **arguments)
            except exceptions.ConnectorException as error:
                if _is_outage(error):
                    raise EngineUnavailableError(str(error.__cause__)) from error
                raise

        await through_outage(attempt, what="settle a job", sleep=self._sleep)
        if job.id is not None:
            self._in_hand.discard(job.id)


def _is_outage(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, exceptions.ConnectorException) else error
    return isinstance(cause, psycopg.OperationalError)
