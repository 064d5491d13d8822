"""The official SDK of the wire format, from npm and unchanged, against a running Mollifier in divert mode."""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from mollifier.child_environment import ChildEnvironment
from mollifier.embedded import EmbeddedStack, Stack
from mollifier.model import Entry, Tenant
from mollifier.play.stage import Organization, make_tenants
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.migrate import migrate_async
from mollifier.postgres.tenants import Tenants
from mollifier.processes import Processes
from mollifier.rollout import Mode
from mollifier.settings import Settings
from mollifier.tasks import discover
from tests.conftest import skipping_without_wheels
from tests.divert.conftest import House

HERE = Path(__file__).parent
NODE_MIN = 20
INSTALL_S, SCRIPT_S = 120, 120
TASKS = ["mollifier.demo_tasks", "tests.sdk.tasks"]
# The first trigger of an environment passes, and every later one is held, however busy this machine is.
BURSTING = {
    "MOLLIFIER_TRIP_THRESHOLD": "1",
    "MOLLIFIER_TRIP_WINDOW_MS": "60000",
    "MOLLIFIER_HOLD_MS": "3600000",
    "MOLLIFIER_GATE_DEADLINE_MS": "30000",
    "MOLLIFIER_ACCEPT_DEADLINE_MS": "30000",
}

pytestmark = [pytest.mark.sdk, pytest.mark.timeout(INSTALL_S + SCRIPT_S)]


async def test_the_official_sdk_sees_held_runs_as_it_sees_created_ones(tmp_path: Path) -> None:
    node = node_or_skip()
    install()
    with skipping_without_wheels():
        async with EmbeddedStack(durable=False) as stack, staged(stack, tmp_path / "log") as (processes, variables):
            code = await processes.alongside(play(node, variables), SCRIPT_S, "the script did not end")
    if code:
        pytest.fail("the SDK saw what it should not; the report of its tests is above", pytrace=False)


def node_or_skip() -> str:
    """Return the program; skip where it, or npm, is missing or too old."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        pytest.skip(f"needs Node.js {NODE_MIN} or later, with npm, on the PATH")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    major = re.match(r"v(\d+)\.", version)
    if major is None or int(major[1]) < NODE_MIN:
        pytest.skip(f"needs Node.js {NODE_MIN} or later, and {node} is {version or 'broken'}")
    return node


def install() -> None:
    """Put the packages that `package.json` pins beside it, unless they are there already."""
    pins: dict[str, str] = msgspec.json.decode((HERE / "package.json").read_bytes())["dependencies"]
    if all(installed(package) == version for package, version in pins.items()):
        return
    options = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--loglevel=error"]
    command = ["npm", "install", *options]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode:
        pytest.fail(f"`{' '.join(command)}` failed in {HERE}:\n{done.stdout}{done.stderr}", pytrace=False)


def installed(package: str) -> str | None:
    try:
        return msgspec.json.decode((HERE / "node_modules" / package / "package.json").read_bytes())["version"]
    except (OSError, msgspec.DecodeError):
        return None


async def play(node: str, variables: Mapping[str, str]) -> int:
    """Run the script to its exit code. Its report goes where this process's output goes."""
    process = await asyncio.create_subprocess_exec(
        *(node, "--test-reporter=spec", "sdk.test.mjs"),
        cwd=HERE,
        env={**unrelated_environment(), **variables},
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def staged(stack: Stack, log: Path) -> AsyncGenerator[tuple[Processes, dict[str, str]]]:
    """Run the API in divert mode and the stage hand; what the script has to know of them are variables."""
    await migrate_async(stack.database_url)
    settings = Settings(enabled=True, divert=True, redis_url=stack.redis_url, database_url=stack.database_url)
    async with Database(stack.database_url) as database, api(stack, log) as processes:
        await record_tasks(database, {name: task.__module__ for name, task in discover(TASKS).items()})
        tenants = await make_tenants(Tenants(database), [Organization("Held"), Organization("Created")], enroll=True)
        house = House(settings, database)
        try:
            async with serving(StageHand(house, processes, tenants)) as url:
                yield (
                    processes,
                    {
                        "MOLLIFIER_URL": processes.api_urls[0],
                        "MOLLIFIER_STAGE_URL": url,
                        "MOLLIFIER_KEY_HELD": tenants[0].api_key,
                        "MOLLIFIER_KEY_CREATED": tenants[1].api_key,
                    },
                )
        finally:
            await house.mollifier.aclose()


@asynccontextmanager
async def api(stack: Stack, log: Path) -> AsyncGenerator[Processes]:
    """Run the API, and no worker yet: nothing drains, nothing executes."""
    environment = ChildEnvironment(
        {**unrelated_environment(), **BURSTING, "MOLLIFIER_TASKS": ",".join(TASKS)}, Mode.DIVERT
    )
    servers = {"redis_url": stack.redis_url, "database_url": stack.database_url}
    processes = Processes(environment.on(**servers, admin_token="admin"), log)
    try:
        await processes.start_apis([0])
        await processes.ready()
        yield processes
    finally:
        await processes.stop()


def unrelated_environment() -> dict[str, str]:
    """Return this process's environment without what would tell the server or the SDK to behave otherwise."""
    ours = ("MOLLIFIER_", "OTEL_", "TRIGGER_")
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}


class StageHand:
    """Does for the script what no client can: tells what is held, has it created, has it executed."""

    def __init__(self, house: House, processes: Processes, tenants: Sequence[Tenant]) -> None:
        self._house = house
        self._processes = processes
        self._tenants = tenants

    async def held(self, _: web.Request) -> web.Response:
        """Answer the ids of the runs that are in the buffer."""
        queues = [await self._house.buffer.list_entries(t.org_id, t.env_id, limit=1000) for t in self._tenants]
        return answer([entry.run_id for entries in queues for entry in entries if isinstance(entry, Entry)])

    async def create(self, _: web.Request) -> web.Response:
        """Drain the buffer. Without a worker, what is created stays as it is."""
        await self._house.drain()
        counts = await self._house.buffer.counts()
        return answer({"failed": counts.failed, "left": counts.left})

    async def execute(self, _: web.Request) -> web.Response:
        """Start a worker."""
        await self._processes.start_worker()
        return answer({})


def answer(body: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


@asynccontextmanager
async def serving(hand: StageHand) -> AsyncGenerator[str]:
    """Serve the stage hand, one route for each thing it does."""
    app = web.Application()
    app.add_routes([web.post(f"/{do.__name__}", do) for do in (hand.held, hand.create, hand.execute)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()
