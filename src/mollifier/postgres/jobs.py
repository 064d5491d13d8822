"""The jobs of procrastinate that execute runs: one per queued run, with the run's id as its only argument.

A job is made by the statement that queues its run, so that neither exists without the other; hence as SQL, through the function
that procrastinate's own clients call. Delayed runs have no job yet: fetching one walks over every job scheduled for later, 13 ms
with 100,000 of them. Upkeep queues a run, and makes its job, when it is due.
"""

from __future__ import annotations

EXECUTE = "mollifier.execute"
"""The name of the one kind of job."""
RUN_ID = "run_id"
"""Its one argument."""
DEFAULT_QUEUE = "default"
QUEUE_BYTES_MAX = 40
"""Procrastinate notifies on a channel named after the queue, and Postgres has 63 bytes for the whole name."""

_QUEUE = f"""CASE
    WHEN queue IS NULL THEN '{DEFAULT_QUEUE}' WHEN octet_length(queue) <= {QUEUE_BYTES_MAX} THEN queue ELSE '~' || md5(queue)
END"""


def defer_sql(condition: str = "", scheduled_at: str = "NULL") -> str:
    """Return the SQL expression that makes a job for each row of its query that meets the condition, oldest run first.

    The query has the columns id, queue, priority and created_at of the runs. The value is the new jobs' ids, or NULL for none. A queue
    whose name is too long for procrastinate goes by a digest of it; workers serve every queue.
    """
    job = f"""ROW(
        {_QUEUE}, '{EXECUTE}', priority, NULL, NULL, jsonb_build_object('{RUN_ID}', id), {scheduled_at}
    )::procrastinate_job_to_defer_v1"""
    jobs = f"array_agg({job} ORDER BY created_at, id)"
    return (
        f"procrastinate_defer_jobs_v1({jobs} FILTER ({condition}))"
        if condition
        else f"procrastinate_defer_jobs_v1({jobs})"
    )
