"""What the system says it did: decisions from `/metrics`, entries from the buffer, connections from its server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from mollifier.errors import MollifierError
from mollifier.model import EntryKind

_OK = 200


class EvidenceError(MollifierError):
    """The system was asked what it did and gave no usable answer."""


# --- decisions -----------------------------------------------------------------------------------------------------


class Decisions(NamedTuple):
    """Counts of the trigger path since its processes started: `outcomes` of the gate, `mollified` per enrolled organization.

    `over_cap` has what became of triggers that a cap kept out of the buffer: create, reject or fail. `failed_open` has by part how many
    triggers survived a failure of it.
    """

    outcomes: Counter[str]
    mollified: Counter[str]
    over_cap: Counter[str]
    failed_open: Counter[str]

    def since(self, before: Decisions) -> Decisions:
        """Return what came on top of the earlier counts."""
        since = Decisions(*(counts.copy() for counts in self))
        for counts, earlier in zip(since, before, strict=True):
            counts.subtract(earlier)
        return since


def parse_decisions(texts: Iterable[str]) -> Decisions:
    """Return the sum over all replicas; each text is what one answers at `/metrics`."""
    outcomes, mollified, over_cap, failed_open = (Counter[str]() for _ in range(4))
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                count = int(sample.value)
                if sample.name == "mollifier_decisions_total":
                    outcomes[sample.labels["outcome"]] += count
                    if sample.labels["outcome"] == "mollify" and "org_id" in sample.labels:
                        mollified[sample.labels["org_id"]] += count
                elif sample.name == "mollifier_over_cap_total":
                    over_cap[sample.labels["outcome"]] += count
                elif sample.name == "mollifier_failed_open_total":
                    failed_open[sample.labels["part"]] += count
    return Decisions(outcomes, mollified, over_cap, failed_open)


async def read_decisions(session: aiohttp.ClientSession, api_urls: Sequence[str]) -> Decisions:
    """Ask every replica. Raises EvidenceError."""
    return parse_decisions([await _get(session, f"{url}/metrics") for url in api_urls])


# --- the buffer ----------------------------------------------------------------------------------------------------


class BufferCounts(msgspec.Struct, frozen=True):
    """How many entries there are in each state that is not settled, as the admin API says."""

    queued: int
    waiting: int
    draining: int
    failed: int

    @property
    def left(self) -> int:
        """All of them."""
        return self.queued + self.waiting + self.draining + self.failed


async def read_left_in_buffer(session: aiohttp.ClientSession, api_url: str, admin_token: str) -> int:
    """Ask the admin API how many entries are not settled. Raises EvidenceError."""
    headers = {"Authorization": f"Bearer {admin_token}"}
    text = await _get(session, f"{api_url}/admin/api/v1/buffer", headers)
    try:
        return msgspec.json.decode(text, type=BufferCounts).left
    except msgspec.DecodeError as error:
        raise EvidenceError(f"{api_url}/admin/api/v1/buffer answered something else than counts: {error}") from error


class _Entry(msgspec.Struct, rename="camel"):
    run_id: str
    kind: EntryKind | None = None


class _Entries(msgspec.Struct):
    data: list[_Entry]


async def read_held_runs(
    session: aiohttp.ClientSession, api_url: str, admin_token: str, env_id: str, limit: int = 200
) -> list[str]:
    """Ask the admin API for the runs of the environment that are held and wait to be drained, oldest first. Raises EvidenceError."""
    headers = {"Authorization": f"Bearer {admin_token}"}
    url = f"{api_url}/admin/api/v1/buffer/entries?env={env_id}&limit={limit}"
    text = await _get(session, url, headers)
    try:
        entries = msgspec.json.decode(text, type=_Entries).data
    except msgspec.DecodeError as error:
        raise EvidenceError(f"{url} answered something else than entries: {error}") from error
    return [entry.run_id for entry in entries if entry.kind is EntryKind.HELD]


async def connections_received(redis_url: str) -> int:
    """Return how many connections the server has accepted in its life, this one included."""
    async with Redis.from_url(redis_url) as redis:  # pyright: ignore[reportUnknownMemberType] - the client types no options
        info: Mapping[str, Any] = await redis.info("stats")  # pyright: ignore[reportUnknownMemberType] - as above
    return int(info["total_connections_received"])


async def _get(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str] | None = None) -> str:
    try:
        async with session.get(url, headers=headers) as response:
            text = await response.text()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise EvidenceError(f"{url} cannot be read: {error}") from error
    if response.status != _OK:
        raise EvidenceError(f"{url} answered {response.status}: {text[:300]}")
    return text
