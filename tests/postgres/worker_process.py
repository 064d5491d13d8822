"""A worker as a process of its own: `python -m tests.postgres.worker_process DATABASE_URL`."""

import asyncio
import sys

from mollifier.postgres.database import Database
from mollifier.postgres.worker import run_worker
from mollifier.tasks import discover


async def main(database_url: str) -> None:
    async with Database(database_url) as database:
        await run_worker(database, discover(["tests.postgres.slow_tasks"]), stop=asyncio.Event())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
