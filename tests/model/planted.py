"""Bugs to plant in the scripts, each of which the model-based test has to find: proof that it can fail."""

from __future__ import annotations

from collections.abc import Mapping

from tests.model.virtual import Edit

Replacements = Mapping[str, str]
"""What to put in the place of what, in every script that has it."""

PLANTED: Mapping[str, Replacements] = {
    "settle without the fencing check": {"found[1] == 'DRAINING' and found[2] == lease": "found[1] == 'DRAINING'"},
    "requeue without the ready index": {
        "  add(KEYS[2], sequence, ARGV[1], ttl)\n  mark_ready(KEYS[4], KEYS[5], ARGV[2], ARGV[3], now_ms(), ttl)": (
            "  add(KEYS[2], sequence, ARGV[1], ttl)"
        )
    },
    "retry without its not-before time": {"if ARGV[5] == '0' then": "if true then"},
    "claim without the owner's token": {"'claim:' .. ARGV[1]": "'claim:'", "'claim:' .. ARGV[8]": "'claim:'"},
    "reclaim what has not expired": {"tonumber(deadline) > now": "false"},
    "pop the newest first": {
        "redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)": "redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1, 'REV')"
    },
    "leave the lease of an audit copy to whoever has it": {"  redis.call('ZREM', KEYS[11], ARGV[1])\n": ""},
    "revive what is being drained": {"if is_alive(fields.state": "if false and is_alive(fields.state"},
    "hold beyond the caps": {"if sums[i] + more > tonumber(most[i]) then": "if false then"},
    "ack what has changed": {"verdict == 'held' and patches ~= ARGV[i + 2]": "false"},
    "report without the claim": {"redis.call('GET', KEYS[1]) ~= 'claim:' .. ARGV[1]": "false"},
}


def planting(bug: str) -> Edit:
    """Return the edit that plants the bug. Raises LookupError where no script has the place any more."""
    replacements = PLANTED[bug]

    def edit(_name: str, source: str) -> str:
        for old, new in replacements.items():
            source = source.replace(old, new)
        return source

    return edit


def places(bug: str, sources: Mapping[str, str]) -> Mapping[str, list[str]]:
    """Name the scripts in which each replacement of the bug changes something."""
    return {old: [name for name, source in sources.items() if old in source] for old in PLANTED[bug]}
