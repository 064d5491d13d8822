"""4. Dead letters: what an operator does about them. Whatever is replayed or deleted leaves a structured event, without its payload.

A replayed letter is drained like any other entry: where its run exists by now, it makes no second one, and where a key of the caller's
belongs to another run by now, its run is created CANCELED and names that one. A deleted letter is gone: its trigger never becomes a run.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mollifier.buffer import Buffer, Disposal, Revival
from mollifier.errors import BufferUnavailableError
from mollifier.letters import Letter
from mollifier.telemetry import event

_MISSING = "there is no dead letter of this run"
_REFUSALS = {
    "missing": _MISSING,
    "gone": "nothing is left of it to replay: {fault}",
    "malformed": "its entry does not read as one: {fault}; mend it, or delete the letter",
    "alive": "its entry is on its way, or has arrived; to delete the letter costs it nothing",
}


class Refused(msgspec.Struct, frozen=True):
    """Why nothing was done about a run; `is_missing` where it is no dead letter."""

    run_id: str
    detail: str
    is_missing: bool = False


Outcome = Letter | Refused | BufferUnavailableError
"""What became of one: the letter as it was before, where that was done which was asked for."""


async def replay_many(buffer: Buffer, run_ids: Sequence[str]) -> list[Outcome]:
    """Put dead letters back into their queues; see `Buffer.revive_many`. One outcome for each different run, in order."""
    outcomes = await buffer.revive_many(list(dict.fromkeys(run_ids)))
    return [outcome if isinstance(outcome, BufferUnavailableError) else _replayed(outcome) for outcome in outcomes]


async def delete_many(buffer: Buffer, run_ids: Sequence[str]) -> list[Outcome]:
    """Drop dead letters for good; see `Buffer.discard_many`. One outcome for each different run, in order."""
    outcomes = await buffer.discard_many(list(dict.fromkeys(run_ids)))
    return [outcome if isinstance(outcome, BufferUnavailableError) else _deleted(outcome) for outcome in outcomes]


def _replayed(outcome: Revival) -> Letter | Refused:
    if outcome.reply == "revived" and outcome.letter is not None:
        return _told("mollifier.dead_letter_replayed", outcome.letter)
    detail = _REFUSALS[outcome.reply].format(fault=outcome.fault or "it has changed meanwhile")
    return Refused(outcome.run_id, detail, is_missing=outcome.reply == "missing")


def _deleted(outcome: Disposal) -> Letter | Refused:
    if outcome.reply == "discarded" and outcome.letter is not None:
        return _told("mollifier.dead_letter_deleted", outcome.letter)
    return Refused(outcome.run_id, _MISSING, is_missing=True)


def _told(name: str, letter: Letter) -> Letter:
    event(name, run_id=letter.run_id, env_id=letter.env_id, org_id=letter.org_id, reason=letter.reason)
    return letter
