"""Checks of how much the buffer's server can hold, and may: its memory, and the caps."""

from __future__ import annotations

from mollifier.caps import CapUse, uses
from mollifier.doctor.facts import BufferFacts
from mollifier.doctor.findings import Judgement, critical, info, ok, unknown, warning
from mollifier.settings import Settings, variable

NEAR, FULL = 0.75, 0.9
"""Shares of the memory at which it is time to act, and late."""
CAP_NEAR = 0.8
ENTRY_BYTES = 1_200
"""What a held entry takes beside its payload (Valkey 9.1, 64-bit): 800, and 360 for each of its keys."""


def memory(facts: BufferFacts, _settings: Settings) -> Judgement:
    """Is there room?"""
    limit, used = facts.max_memory_bytes or facts.system_memory_bytes, facts.used_memory_bytes
    if not limit or used is None:
        return unknown(
            "how much memory is in use, and how much there is, is not told",
            "a full buffer refuses entries",
            "watch it where the server is run",
        )
    share = used / limit
    what = f"{_size(used)} of {_size(limit)} in use ({share:.0%})"
    if share >= NEAR:
        worse = critical if share >= FULL else warning
        return worse(
            what,
            "a full buffer refuses entries, so bursts go to the database after all",
            "find out why it fills (are workers draining?), or give the server more memory",
        )
    if not facts.max_memory_bytes:
        return info(
            f"{what}, no maxmemory set",
            "when the machine runs out, the operating system ends the server instead of the server refusing a write",
            "set maxmemory to about three quarters of the machine's memory",
        )
    return ok(what)


def caps(facts: BufferFacts, settings: Settings) -> Judgement:
    """Does what may be held fit into the server, and is there room left under the caps?"""
    if not settings.divert:
        return ok("nothing is held, only copied")
    if facts.usage is None:
        return unknown(
            "how much is held is not told",
            "over a cap nothing more is held",
            "watch `/admin/api/v1/buffer` of the API",
        )
    full = [use for use in uses(settings, facts.usage) if use.held >= CAP_NEAR * use.most]
    if full:
        then = "are created directly, in every burst" if settings.held_over_cap == "create" else "are rejected (429)"
        return warning(
            "; ".join(f"{variable(use.cap)}: {use.held / use.most:.0%} in use{_by(use)}" for use in full),
            f"over a cap nothing more is held: triggers {then}",
            "find out why it fills (are workers draining? did entries fail?), or raise the cap if the server has the memory",
        )
    return _fitting(facts, settings)


def _fitting(facts: BufferFacts, settings: Settings) -> Judgement:
    """Judge the caps on everything by the memory there is; entries of a few hundred bytes take several times as much."""
    entries, in_bytes = settings.held_max_entries, settings.held_max_bytes
    memory_bytes = facts.max_memory_bytes or facts.system_memory_bytes
    if not entries or not in_bytes:
        unset = " and ".join(
            variable(cap) for cap in ("held_max_entries", "held_max_bytes") if not getattr(settings, cap)
        )
        return info(
            f"{unset} set to 0: what is held is bounded by the server's memory alone",
            "with its memory full it cannot even count triggers: bursts of every tenant go to the database then",
            f"set {variable('held_max_bytes')} to about half of its memory, and {variable('held_max_entries')}",
        )
    needed = in_bytes + entries * ENTRY_BYTES
    what = f"{entries:,} entries and {_size(in_bytes)} may be held in all"
    if memory_bytes and needed > memory_bytes:
        return warning(
            f"{what}, which takes up to {_size(needed)}; the server has {_size(memory_bytes)}",
            "with its memory full it cannot even count triggers: bursts of every tenant go to the database then",
            f"set {variable('held_max_bytes')}={memory_bytes // 2} and {variable('held_max_entries')}={memory_bytes // 4 // ENTRY_BYTES}, "
            "or give the server more memory",
        )
    return ok(what)


def _by(use: CapUse) -> str:
    return f" by {use.owner_id}" if use.owner_id else ""


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:  # noqa: PLR2004 - what a unit is of the next
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
