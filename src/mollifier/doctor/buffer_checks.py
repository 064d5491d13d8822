"""Checks of the buffer's server: does what is held survive, does it fit, and is the server ours alone?

Held entries are the only copies of their triggers, audit copies are not: so what loses them is critical where triggers are diverted,
and a warning elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

from mollifier.doctor.capacity_checks import caps, memory
from mollifier.doctor.facts import BufferFacts
from mollifier.doctor.findings import Judgement, critical, info, ok, unknown, warning
from mollifier.server import PIPELINES
from mollifier.settings import Settings, variable

LAG_S = 10
_REDIS_FLOOR, _VALKEY_FLOOR, _WAITAOF_FLOOR, _HONEST_WAITAOF = (7, 0), (8,), (7, 2), (8,)


def persistence(facts: BufferFacts, settings: Settings) -> Judgement:
    """Is there an append-only file?"""
    worse = critical if settings.divert else warning
    if facts.write_failure is not None:
        return worse(
            f"the server reports that {facts.write_failure}",
            "what it holds is not on disk, and it refuses writes as long as that lasts",
            "look into the server's log: the disk is full or not writable, as a rule",
        )
    if facts.aof is False and settings.confirmation.aof:
        return critical(
            f"no append-only file, and {variable('accept_confirm')} is aof",
            "no accept is ever confirmed: each is stored and its run created directly as well, in every burst",
            "set appendonly yes on the buffer's server (and appendfsync everysec)",
        )
    match facts.aof, facts.snapshots:
        case True, _:
            return _append_only(facts, settings)
        case None, _:
            return unknown(
                "whether the server keeps an append-only file is not told",
                "without one, what is held is lost when the server restarts",
                "see to it that it does: appendonly yes, appendfsync everysec or always",
            )
        case False, "":
            return worse(
                "nothing is written to disk: no append-only file, no snapshots",
                "every held trigger is lost when the server restarts",
                "set appendonly yes on the buffer's server (and appendfsync everysec or always)",
            )
        case False, snapshots:
            kept = f"snapshots ({snapshots})" if snapshots else "snapshots at best"
            return warning(
                f"no append-only file, {kept}",
                "what was accepted after the last snapshot is lost when the server crashes: minutes, up to an hour",
                "set appendonly yes on the buffer's server (and appendfsync everysec or always)",
            )


def _append_only(facts: BufferFacts, settings: Settings) -> Judgement:
    match facts.appendfsync:
        case "always":
            return ok("append-only file, synced at each write: a crash loses nothing that was answered")
        case "everysec" if settings.confirmation.aof and not _confirms_the_sync(facts):
            return warning(
                "append-only file, synced every second; this server's WAITAOF answers before that",
                "accepts are answered as confirmed up to a second before they are on disk (Valkey, and Redis before 8.0)",
                "set appendfsync always, which syncs before each answer; or use Redis 8.0 or later",
            )
        case "everysec" if settings.confirmation.aof:
            return ok(
                "append-only file, synced every second, and accepts wait for it: a crash loses nothing that was answered"
            )
        case "everysec":
            return ok(
                "append-only file, synced every second: a crash of its machine may cost the last second, or three"
            )
        case "no":
            worse = critical if settings.confirmation.aof else warning
            return worse(
                "append-only file, synced when the operating system sees fit (appendfsync no)",
                "a crash of its machine may cost half a minute of held triggers, and no accept can be confirmed by it",
                "set appendfsync everysec, or always",
            )
        case _:
            return unknown(
                "append-only file; how often it is synced is not told",
                "a crash of its machine costs what was written since the last sync",
                "see to it that it is everysec or always",
            )


def _confirms_the_sync(facts: BufferFacts) -> bool:
    """Tell whether WAITAOF waits for the sync under everysec: others take what was written within a second of a sync for synced."""
    return facts.product == "redis" and facts.version is not None and facts.version >= _HONEST_WAITAOF


def eviction(facts: BufferFacts, settings: Settings) -> Judgement:
    """May the server throw away what it holds?"""
    if facts.policy is None:
        return unknown(
            "the eviction policy is not told",
            "any policy but noeviction throws held triggers away when memory runs out",
            "see to it that maxmemory-policy is noeviction",
        )
    if facts.policy != "noeviction":
        worse = critical if settings.divert else warning
        evicted = f"; {facts.evicted_keys} keys have been evicted since it started" if facts.evicted_keys else ""
        return worse(
            f"maxmemory-policy is {facts.policy}{evicted}",
            "the server throws keys away when memory runs out, and with them held triggers, in silence",
            "set maxmemory-policy noeviction: a full buffer then refuses, and triggers are created directly",
        )
    if facts.evicted_keys:
        return warning(
            f"{facts.evicted_keys} keys have been evicted since the server started, under an earlier policy",
            "some of them may have been held triggers",
            "run `mollifier audit` over the logs of that time; the policy is noeviction by now",
        )
    return ok("noeviction: a full buffer refuses, it throws nothing away")


def version(facts: BufferFacts, settings: Settings) -> Judgement:
    """Does the server know what the scripts, and the confirmation that is asked for, need?"""
    if facts.version is None:
        return unknown("the server's version is not told", "Valkey 8 or Redis 7.0 is the least", "see to it that it is")
    name = f"{facts.product.capitalize()} {'.'.join(map(str, facts.version))}"
    if facts.product == "redis" and facts.version < _REDIS_FLOOR:
        return critical(
            name, "the scripts use commands that it does not know", "use Valkey 8 or later, or Redis 7.0 or later"
        )
    if settings.confirmation.aof and facts.version < _WAITAOF_FLOOR:
        return critical(
            f"{name} has no WAITAOF, which {variable('accept_confirm')}=aof needs",
            "no accept is ever confirmed: each is stored and its run created directly as well, in every burst",
            f"use Valkey 8 or later, Redis 7.2 or later, or another {variable('accept_confirm')}",
        )
    if facts.product == "valkey" and facts.version < _VALKEY_FLOOR:
        return warning(name, "nobody has tried Mollifier with it", "use Valkey 8 or later")
    return ok(name)


def access(facts: BufferFacts, settings: Settings) -> Judgement:
    """May this user run scripts on our keys, and have what they write confirmed where that is asked for?"""
    if facts.refused is not None:
        return critical(
            f"a script was refused: {facts.refused}",
            "every operation of the buffer is a script, so nothing can be held and nothing drained",
            "let the user run EVAL and EVALSHA on the keys mollifier:* and use the channel mollifier:wake",
        )
    if facts.unconfirming is not None:
        return critical(
            f"{variable('accept_confirm')} is {settings.accept_confirm}, and the question was refused: {facts.unconfirming}",
            "no accept is ever confirmed: each is stored and its run created directly as well, in every burst",
            f"let the user run {'WAITAOF' if settings.confirmation.aof else 'WAIT'}, which docs/security.md has in a line of its own",
        )
    return ok("scripts may run on the buffer's keys")


def role(facts: BufferFacts, _settings: Settings) -> Judgement:
    """Is it the one that takes writes?"""
    if facts.is_replica is None:
        return unknown(
            "whether it is a primary is not told", "a replica refuses writes", "name the primary in the settings"
        )
    if facts.is_replica:
        return critical(
            "the server is a replica",
            "it refuses writes, so nothing can be held or drained",
            f"let {variable('redis_url')} name the primary, by an address that follows a failover",
        )
    if facts.cluster:
        return warning(
            "the server is a node of a Cluster",
            "this release speaks to one server: keys of other nodes' slots answer MOVED, and their triggers pass",
            "use one server, with replicas, for the buffer",
        )
    return ok("a primary, not in a Cluster")


def replicas(facts: BufferFacts, settings: Settings) -> Judgement:
    """Are there as many replicas as accepts wait for, and do they keep up?"""
    if facts.replicas is None:
        return unknown(
            "replicas are not told",
            "a failover loses what the replica does not have yet",
            "look where the server is run whether they keep up",
        )
    wanted = settings.confirmation.replicas
    online = sum(each.online for each in facts.replicas)
    if online < wanted:
        return critical(
            f"{online} replicas are online, {variable('accept_confirm')} asks for {wanted}",
            "no accept can be confirmed: each waits for the deadline and its run is then created directly as well",
            "bring the replicas back, or ask for fewer",
        )
    behind = [each for each in facts.replicas if not each.online or (each.lag_s or 0) > LAG_S]
    if behind:
        return warning(
            f"behind or not online: {', '.join(each.name for each in behind)}",
            "a failover to such a replica loses what it does not have",
            "look at its log and at the network between the two",
        )
    return ok(f"replicas: {len(facts.replicas)}, none behind")


def layout(facts: BufferFacts, settings: Settings) -> Judgement:
    """Was the buffer made with as many partitions as the settings say?"""
    if facts.partitions is None:
        return unknown(
            "how many partitions the buffer has is not told",
            "with another number, entries are looked for where they are not",
            "let the user GET mollifier:partitions",
        )
    if not facts.partitions:
        return ok(f"no buffer here yet; it will have {settings.partitions} partitions")
    if facts.partitions != settings.partitions:
        return critical(
            f"the buffer was made with {facts.partitions} partitions, {variable('partitions')} is {settings.partitions}",
            "entries would be looked for where they are not, so API and workers stop at boot",
            f"set {variable('partitions')}={facts.partitions}",
        )
    return ok(f"{facts.partitions} partitions, as the settings say")


def tenancy(facts: BufferFacts, _settings: Settings) -> Judgement:
    """Does somebody else keep keys on it?"""
    sample = facts.sample
    others = [f"databases with keys of others: {', '.join(facts.other_databases)}"] if facts.other_databases else []
    if sample is not None and sample.foreign:
        share = f"about {sample.foreign / sample.drawn:.0%} of {facts.keys or 'its'} keys are not Mollifier's"
        named = f" ({', '.join(f'{prefix}:...' for prefix in sample.prefixes)})" if sample.prefixes else ""
        others.insert(0, share + named)
    if others:
        return warning(
            "; ".join(others),
            "another application's load, memory or FLUSHALL is the buffer's: the server is meant to hold when others fail",
            "give the buffer a server of its own",
        )
    if sample is None:
        return unknown(
            "whose keys are on the server is not told",
            "a shared server shares its load and its memory",
            "look for yourself",
        )
    return ok("no keys of another application" if sample.drawn else "empty")


def connections(facts: BufferFacts, settings: Settings) -> Judgement:
    """Are there connections enough?"""
    each = PIPELINES * (2 if settings.confirmation.is_asked else 1) + 1
    if facts.clients is None or not facts.max_clients:
        return unknown(
            "how many connections the server takes is not told",
            "one that is over the limit is refused, and its trigger passes",
            f"allow {each} for each API and worker process",
        )
    what = f"{facts.clients} of {facts.max_clients} connections in use, up to {each} by each process"
    if facts.clients + 2 * each > facts.max_clients:
        return warning(
            what,
            "there is no room for one more API and one more worker; what is over the limit is refused, and its triggers pass",
            "raise maxclients",
        )
    return ok(what)


def transport(facts: BufferFacts, _settings: Settings) -> Judgement:
    """Can somebody on the way read or change what is held?"""
    address = facts.address
    if address.reach == "local":
        return ok("on this machine")
    missing = [
        *(["no TLS"] if not address.encrypted else []),
        *(["no password"] if not address.password else []),
    ]
    if not missing:
        return ok("TLS and a password")
    level = warning if address.reach == "public" else info
    return level(
        f"{' and '.join(missing)} on {'a private network' if address.reach == 'private' else 'an address that may be far away'}",
        "whoever is on the way, or reaches the server, reads and changes customers' payloads",
        f"use rediss:// and a user with a password in {variable('redis_url')}",
    )


BUFFER_CHECKS: tuple[Callable[[BufferFacts, Settings], Judgement], ...] = (
    access,
    role,
    version,
    layout,
    persistence,
    eviction,
    memory,
    caps,
    replicas,
    connections,
    tenancy,
    transport,
)
