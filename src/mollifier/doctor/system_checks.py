"""Checks across the parts: settings that contradict, work that nobody does, clocks that differ."""

from __future__ import annotations

from collections.abc import Callable

from mollifier.doctor.facts import BufferFacts, DatabaseFacts, Facts
from mollifier.doctor.findings import Judgement, critical, info, ok, unknown, warning
from mollifier.inspection import STALLED_MS
from mollifier.settings import Settings, variable

CLOCK_WARNING_MS, CLOCK_CRITICAL_MS = 1_000, 60_000
MISSED_SWEEPS = 4
"""How many intervals a sweep may be late, beside what it takes: a millisecond for each entry is more than enough."""


def settings(facts: Facts) -> Judgement:
    """Do the settings contradict each other?"""
    given = facts.settings
    return _no_database(given) or _no_buffer(given) or _nobody_drains(given) or _no_effect(given) or ok(_step(given))


def drainers(facts: Facts) -> Judgement:
    """Is anybody at work, and does somebody drain? Drainers listen on a channel of the buffer's server, which counts them."""
    workers = facts.database.workers if isinstance(facts.database, DatabaseFacts) else None
    draining = facts.buffer.drainers if isinstance(facts.buffer, BufferFacts) else None
    if facts.starting:
        workers = 1 if workers is None else max(1, workers)
        draining = None if draining is None else max(draining, int(facts.settings.drains))
    if facts.settings.active and facts.settings.divert and (draining == 0 or workers == 0):
        return critical(
            "triggers are diverted and no worker drains",
            "what is held stays held: its runs are not created before a worker drains",
            f"start `mollifier worker` with {variable('redis_url')} and {variable('enabled')} set as here",
        )
    if workers == 0:
        return warning("no worker is alive", "nobody executes runs", "start `mollifier worker`")
    if draining == 0 and facts.settings.drains:
        return warning(
            "no worker drains",
            "what is buffered stays there until it expires",
            f"start `mollifier worker` with {variable('redis_url')} and {variable('enabled')} set as here",
        )
    if workers is None:
        return unknown(
            "how many workers are alive is not told", "without one nobody executes runs", "see to it that one runs"
        )
    listening = "" if draining is None else f", {draining} drain"
    return ok(f"{workers} worker{'' if workers == 1 else 's'} alive{listening}")


def _not_looked_into(facts: Facts) -> Judgement:
    if facts.buffer is None:
        return ok("there is no buffer")
    return unknown(
        "the buffer could not be looked into",
        "nobody knows what it holds",
        "mend what `buffer.reachable` says, and ask again",
    )


def leftovers(facts: Facts) -> Judgement:
    """Is something left in the buffer that nobody takes out?"""
    if not isinstance(facts.buffer, BufferFacts):
        return _not_looked_into(facts)
    counts = facts.buffer.counts
    if counts is None:
        return unknown(
            "what the buffer holds cannot be counted",
            "entries may be left that nobody drains",
            "see what `/readyz` of the API says",
        )
    what = f"{counts.queued} queued, {counts.waiting} waiting, {counts.draining} draining"
    stalled = counts.oldest_ms is not None and counts.oldest_ms > STALLED_MS
    moving = counts.left - counts.failed
    if moving and not facts.settings.drains:
        return warning(
            f"{what}, and these settings drain nothing",
            "held triggers wait until somebody drains",
            f"set {variable('drainer_enabled')}=1 for a worker until the buffer is empty",
        )
    if stalled:
        return warning(
            f"{what}; the oldest has been queued for {(counts.oldest_ms or 0) // 1000} s",
            "no drainer takes them, or the drainers are slower than what comes in",
            "look for mollifier.drain_fault in the workers' logs, or start more workers",
        )
    return ok(what if moving else "nothing waits in the buffer")


def dead_letters(facts: Facts) -> Judgement:
    """Did something die in the buffer that nobody has looked after?"""
    if not isinstance(facts.buffer, BufferFacts):
        return _not_looked_into(facts)
    counts = facts.buffer.counts
    if counts is None:
        return unknown(
            "dead letters cannot be counted",
            "a trigger that died in the buffer has no run",
            "see what `mollifier dead-letters list` says",
        )
    if counts.failed:
        return warning(
            f"{counts.failed} dead letter{'' if counts.failed == 1 else 's'}",
            "each is a trigger that was given up and has no run; its payload is kept until somebody decides",
            "`mollifier dead-letters list` says what they died of; mend that, then `replay` them, or `delete` them",
        )
    return ok("there are none")


def sweeper(facts: Facts) -> Judgement:
    """Does the buffer fit together, as far as the last sweep tells, and is it swept?"""
    if not isinstance(facts.buffer, BufferFacts):
        return _not_looked_into(facts)
    report, ago_ms = facts.buffer.sweep, facts.buffer.swept_ago_ms
    left = facts.buffer.counts.left if facts.buffer.counts is not None else 0
    patience_ms = MISSED_SWEEPS * facts.settings.sweep_interval_s * 1000 + left
    if left and not facts.starting and (ago_ms is None or ago_ms > patience_ms):
        when = "within a week" if ago_ms is None else f"for {ago_ms // 1000} s"
        return warning(
            f"the buffer holds {left} entries and has not been swept {when}",
            "an entry that its index has lost waits unseen, for nobody looks for it",
            "see to it that a worker drains, and look for mollifier.drain_fault with operation sweep in the workers' logs",
        )
    if report is None or ago_ms is None:
        return ok("nothing to sweep" if not left else "this worker sweeps as soon as it has started")
    if report.mismatches:
        found = ", ".join(f"{number} {kind}" for kind, number in report.mismatches.items())
        done = ", ".join(f"{number} {kind}" for kind, number in report.repaired.items()) or "nothing"
        return warning(
            f"the last sweep, {ago_ms // 1000} s ago, found what does not fit together: {found}; put right: {done}",
            "something other than Mollifier has changed or evicted its keys, or Mollifier has a defect",
            "see what mollifier.index_repaired says in the workers' logs; sums (usage) come right with DEL of the partition's "
            "usage key once nothing is held, and docs/reliability.md says more",
        )
    return ok(f"swept {ago_ms // 1000} s ago, everything fits together")


def clocks(facts: Facts) -> Judgement:
    """Do the clocks of this host and of the servers agree?"""
    parts = {"the buffer's server": facts.buffer, "the database": facts.database}
    known = {
        name: (part.ahead_ms, part.margin_ms)
        for name, part in parts.items()
        if isinstance(part, BufferFacts | DatabaseFacts) and part.ahead_ms is not None
    }
    if not known:
        return unknown("no clock to compare with", "moments of different clocks are compared", "keep NTP running")
    # The host's own clock is zero; what lies within the margins may be the question's way there and back.
    aheads = [0, *(ahead for ahead, _ in known.values())]
    apart_ms = max(0, max(aheads) - min(aheads) - max(margin for _, margin in known.values()))
    told = ", ".join(
        f"{name} {abs(ahead)} ms {'ahead' if ahead > 0 else 'behind'}" for name, (ahead, _) in known.items()
    )
    if apart_ms < CLOCK_WARNING_MS:
        return ok(f"less than {CLOCK_WARNING_MS // 1000} s apart ({told})")
    worse = critical if apart_ms >= CLOCK_CRITICAL_MS else warning
    return worse(
        f"{apart_ms / 1000:.1f} s apart, seen from this host: {told}",
        "idempotency keys and ttls end early or late by as much, delayed runs start so, and lists are out of order",
        "run NTP (chrony, systemd-timesyncd) on all of them",
    )


SYSTEM_CHECKS: tuple[Callable[[Facts], Judgement], ...] = (
    settings,
    drainers,
    leftovers,
    dead_letters,
    sweeper,
    clocks,
)


def _no_database(given: Settings) -> Judgement | None:
    if given.database_url is not None:
        return None
    return critical(
        f"{variable('database_url')} is not set",
        "neither API nor worker starts",
        "set it to your Postgres: postgresql://user:password@host/database",
    )


def _no_buffer(given: Settings) -> Judgement | None:
    if given.redis_url is not None:
        return None
    if given.drainer_enabled or (given.enabled and given.divert):
        asking = variable("drainer_enabled") if given.drainer_enabled else variable("divert")
        return critical(
            f"{asking} is on and {variable('redis_url')} is not set",
            "a worker does not start so, and nothing is held",
            f"set {variable('redis_url')} to a Valkey or Redis of Mollifier's own, or switch {asking} off",
        )
    if given.enabled:
        return warning(
            f"{variable('enabled')} is on and {variable('redis_url')} is not set",
            "without a buffer every trigger passes, in every burst",
            f"set {variable('redis_url')} to a Valkey or Redis of Mollifier's own",
        )
    return None


def _nobody_drains(given: Settings) -> Judgement | None:
    if given.enabled and not given.drains:
        return warning(
            f"{variable('enabled')} is on, {variable('drainer_enabled')} is off",
            "what processes with these settings buffer, others have to drain",
            f"unset {variable('drainer_enabled')}, unless workers with other settings drain this buffer",
        )
    return None


def _no_effect(given: Settings) -> Judgement | None:
    idle = [variable(name) for name in ("divert", "shadow_mode") if getattr(given, name)]
    if idle and not given.enabled:
        return info(
            f"{' and '.join(idle)} on, {variable('enabled')} off",
            "switched off, nothing else has an effect",
            f"set {variable('enabled')}=1 when the rollout begins",
        )
    if given.confirmation.is_asked and not given.divert:
        return info(
            f"{variable('accept_confirm')} is {given.accept_confirm}, {variable('divert')} is off",
            "only held triggers are confirmed, not audit copies",
            f"unset it, or set {variable('divert')}=1 when the rollout gets there",
        )
    return None


def _step(given: Settings) -> str:
    if not given.enabled:
        return "switched off, and draining what is left" if given.drains else "switched off"
    return "on; bursts of enrolled organizations are " + ("held" if given.divert else "copied to the buffer")
