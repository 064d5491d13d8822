"""Every operation of the buffer, in any order and at any moment, on the real server and on the model: after each step both hold the same.

Holders are as stale as hypothesis likes: whatever was popped, read or peeked once is settled, patched or popped by later on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from mollifier import scripts
from mollifier.buffer import Acceptance, Accepted, Binding, HeldPlace, Look, Popped, Ready, Revival
from mollifier.letters import Letter, LetterPlace
from mollifier.model import Entry, EntryKind, GateInputs
from mollifier.sweeps import SweepReport
from tests.model.twins import SETTINGS, Twins

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., None])

ENVIRONMENTS = [Ready(org, f"{org}/{env}") for org in ("org:1", "{org}") for env in ("a", "b:c")]
EVERYWHERE = [Ready(org_id, ready.env_id) for org_id in ("org:1", "{org}") for ready in ENVIRONMENTS]
"""Where an entry may stand: one whose `env` was spoilt is revived where it says that it belongs."""

DIGESTS = ("0a", "0b", "1c")
"""Of idempotency keys, and of a request key."""
TOKENS = ("", "t1", "t2")
MOMENTS_MS = (-1, 0, 1, 20, 150, 3_000)
"""From now, as keys expire, entries wait and time passes."""

PADDINGS = (b"", b"", b"", b"." * 9, b"." * 40)
"""What makes a payload longer than others: both kinds of caps are met."""

any_pick = st.integers(0, 2) | st.integers(0, 30)
any_environment = st.sampled_from(ENVIRONMENTS)
any_token = st.sampled_from(TOKENS)
any_moment = st.sampled_from(MOMENTS_MS)
any_digests = st.sampled_from([(), ("0a",), ("0b",), ("0a", "0b"), ("1c", "0a")])
some_digests = any_digests.filter(bool)


def picked(things: list[T], pick: int) -> T:
    """Choose one, the newest first, so that what shrinks is about what has just happened."""
    return things[-1 - pick % len(things)]


class Operation(NamedTuple):
    """One thing to do: how often, when it can be done, and with what."""

    weight: int
    needs: Callable[[BufferMachine], object]
    arguments: Mapping[str, st.SearchStrategy[Any]]


_operations: dict[str, Operation] = {}


def always(_machine: BufferMachine) -> bool:
    return True


def operation(
    weight: int = 1, *, needs: Callable[[BufferMachine], object] = always, **arguments: st.SearchStrategy[Any]
) -> Callable[[Method], Method]:
    """Have the machine do this, `weight` times as often as others, where `needs` holds."""

    def add(method: Method) -> Method:
        _operations[method.__name__] = Operation(weight, needs, arguments)
        return method

    return add


def has_accepted(machine: BufferMachine) -> bool:
    return bool(machine.owners)


def has_popped(machine: BufferMachine) -> bool:
    return bool(machine.popped)


def has_seen(machine: BufferMachine) -> bool:
    return bool(machine.seen)


def has_dead(machine: BufferMachine) -> bool:
    return any(key.endswith(":failed") for key in machine.twins.model.store.sets)


def has_spoilt(machine: BufferMachine) -> bool:
    return bool(machine.spoilt)


def has_peeked(machine: BufferMachine) -> bool:
    return bool(machine.peeked)


class BufferMachine(RuleBasedStateMachine):
    """One history. A subclass names the twins."""

    twins: Twins

    def __init__(self) -> None:
        super().__init__()
        self.twins.begin()
        self.owners: dict[str, Ready] = {}
        self.popped: list[Entry] = []
        self.seen: list[Entry] = []
        self.spoilt: list[tuple[str, str, bytes | None]] = []
        self.peeked: list[tuple[Ready, tuple[str, ...]]] = []

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Do any one thing that can be done now."""
        # One rule for all, because hypothesis switches rules off for whole histories: hardly one would have all that it takes.
        possible = [name for name, one in _operations.items() if one.needs(self) for _ in range(one.weight)]
        name = data.draw(st.sampled_from(possible))
        getattr(self, name)(**data.draw(st.fixed_dictionaries(_operations[name].arguments)))

    @property
    def _now_ms(self) -> int:
        return self.twins.now_us // 1000

    # --- storing ---------------------------------------------------------------------------------------------------

    @operation(
        6,
        wanted=st.lists(
            st.tuples(
                any_environment,
                st.sampled_from([None, None, None, 0, 1, 5]),
                st.sampled_from([EntryKind.HELD, EntryKind.HELD, EntryKind.AUDIT]),
                any_digests,
                any_token,
                any_moment,
                st.none() | any_pick,
                st.sampled_from(PADDINGS),
            ),
            min_size=1,
            max_size=3,
        ),
    )
    def accept(
        self, wanted: list[tuple[Ready, int | None, EntryKind, tuple[str, ...], str, int, int | None, bytes]]
    ) -> None:
        acceptances: list[Acceptance] = []
        for ready, again, kind, digests, token, moment_ms, parent, padding in wanted:
            runs = list(self.owners)
            run_id = picked(runs, again) if runs and again is not None else f"run-{len(runs)}"
            owner = self.owners.setdefault(run_id, ready)
            acceptances.append(
                Acceptance(
                    run_id=run_id,
                    env_id=owner.env_id,
                    org_id=owner.org_id,
                    payload=b"payload of " + run_id.encode() + padding,
                    kind=kind,
                    created_us=(self._now_ms + moment_ms) * 1000,
                    parent_run_id=picked(runs, parent) if runs and parent is not None else None,
                    bindings=[Binding(digest, self._now_ms + 2 * moment_ms) for digest in digests],
                    token=token,
                )
            )
        together = [each for each in acceptances if each.env_id == acceptances[0].env_id]
        self.twins.both(lambda buffer: buffer.find_over_cap(together))
        outcomes = self.twins.both(lambda buffer: buffer.accept_many(acceptances))
        for acceptance, outcome in zip(acceptances, outcomes, strict=True):
            if isinstance(outcome, Accepted):
                assert outcome.run_id == acceptance.run_id
        held = self.twins.both(lambda buffer: buffer.usage())
        assert held.total.entries <= SETTINGS.held_max_entries
        assert all(amount.entries <= SETTINGS.held_org_max_entries for amount in held.orgs.values())
        assert all(amount.entries <= SETTINGS.held_env_max_entries for amount in held.envs.values())

    @operation(2, pick=any_pick, patch=st.binary(max_size=3), digests=any_digests, needs=has_seen)
    def patch(self, pick: int, patch: bytes, digests: tuple[str, ...]) -> None:
        entry = picked(self.seen, pick)
        self.twins.both(lambda buffer: buffer.patch(entry, patch, unbind=digests))

    @operation(pick=any_pick, needs=has_seen)
    def mark(self, pick: int) -> None:
        entry = picked(self.seen, pick)
        self.twins.both(lambda buffer: buffer.mark(entry))

    # --- the callers' keys -----------------------------------------------------------------------------------------

    @operation(
        2,
        ready=any_environment,
        digests=some_digests,
        token=any_token,
        life_ms=st.tuples(st.sampled_from([1, 20, 150]), st.sampled_from([None, 0, 10, 50])),
        void=st.lists(st.sampled_from(["", "run-0", "run-1"]), max_size=1),
    )
    def claim(
        self,
        ready: Ready,
        digests: tuple[str, ...],
        token: str,
        life_ms: tuple[int, int | None],
        void: list[str],
    ) -> None:
        lifetime_ms, lease_ms = life_ms
        self.twins.both(
            lambda buffer: buffer.claim_many(ready.org_id, digests, token, lifetime_ms, void, lease_ms=lease_ms)
        )

    @operation(ready=any_environment, digests=some_digests, token=any_token, lifetime_ms=st.sampled_from([1, 20, 150]))
    def prolong(self, ready: Ready, digests: tuple[str, ...], token: str, lifetime_ms: int) -> None:
        self.twins.both(lambda buffer: buffer.prolong(ready.org_id, digests, token, lifetime_ms))

    @operation(ready=any_environment, digests=some_digests, token=any_token)
    def release(self, ready: Ready, digests: tuple[str, ...], token: str) -> None:
        self.twins.both(lambda buffer: buffer.release(ready.org_id, digests, token))

    # --- taking ----------------------------------------------------------------------------------------------------

    @operation(6, shares=st.lists(st.tuples(any_pick, st.integers(1, 4)), min_size=1, max_size=3))
    def pop(self, shares: list[tuple[int, int]]) -> None:
        """Pop where there is something queued, if there is anything anywhere."""
        keys_of, sets = self.twins.keyspace.of, self.twins.model.store.sets
        full = [ready for ready in ENVIRONMENTS if keys_of(ready.org_id).queue(ready.env_id) in sets]
        limits = {picked(full or ENVIRONMENTS, pick): limit for pick, limit in shares}
        self._pop(limits)

    def _pop(self, limits: Mapping[Ready, int]) -> None:
        for taken in self.twins.both(lambda buffer: buffer.pop_many(list(limits.items()))):
            assert isinstance(taken, Popped)
            self.popped += taken.entries
            self.seen += taken.entries

    @operation(ready=any_environment, limit=st.integers(1, 4))
    def peek(self, ready: Ready, limit: int) -> None:
        keys = self.twins.keyspace.of(ready.org_id)
        call = scripts.peek(queue=keys.queue(ready.env_id), waiting=keys.waiting(ready.env_id), limit=limit)
        self.peeked.append((ready, self.twins.call(call)))

    @operation(pick=any_pick, take=st.integers(1, 3), enough=st.sampled_from([1, 150, 10_000]), needs=has_peeked)
    def pop_what_was_peeked_before(self, pick: int, take: int, enough: int) -> None:
        ready, run_ids = picked(self.peeked, pick)
        keys = self.twins.keyspace.of(ready.org_id)
        call = scripts.pop(
            queue=keys.queue(ready.env_id),
            waiting=keys.waiting(ready.env_id),
            envs=keys.envs(ready.org_id),
            orgs=keys.orgs,
            draining=keys.draining,
            failed=keys.failed,
            seq=keys.seq,
            held=keys.held(ready.env_id),
            owners=keys.owners,
            usage=keys.usage,
            children=keys.children(ready.env_id),
            entry=[keys.entry(run_id) for run_id in run_ids],
            env_id=ready.env_id,
            org_id=ready.org_id,
            lease_ms=100,
            take=take,
            enough=enough,
            run_id=run_ids,
        )
        self.twins.call(call)

    @operation(limit=st.integers(1, 3))
    def reclaim(self, limit: int) -> None:
        self.twins.both(lambda buffer: buffer.reclaim_expired(limit))

    @operation(needs=has_popped)
    def replace_the_holders(self) -> None:
        """Let every lease run out, and others take what was held."""
        self.twins.turn(self.twins.now_us + SETTINGS.lease_ms * 1000)
        self.reclaim(100)
        self._pop(dict.fromkeys(ENVIRONMENTS, 2))

    @operation(pick=any_pick, needs=has_accepted)
    def reclaim_what_may_not_have_expired(self, pick: int) -> None:
        run_id = picked(list(self.owners), pick)
        owner = self.owners[run_id]
        keys = self.twins.keyspace.of(owner.org_id)
        call = scripts.reclaim(
            entry=keys.entry(run_id),
            queue=keys.queue(owner.env_id),
            envs=keys.envs(owner.org_id),
            orgs=keys.orgs,
            draining=keys.draining,
            failed=keys.failed,
            held=keys.held(owner.env_id),
            owners=keys.owners,
            usage=keys.usage,
            children=keys.children(owner.env_id),
            binding=[keys.idempotency(DIGESTS[0])],
            run_id=run_id,
            env_id=owner.env_id,
            org_id=owner.org_id,
            max_reclaims=SETTINGS.drain_max_reclaims,
        )
        self.twins.call(call)

    # --- settling --------------------------------------------------------------------------------------------------

    def _some(self, picks: list[int]) -> list[Entry]:
        return [picked(self.popped, pick) for pick in picks]

    @operation(3, picks=st.lists(any_pick, min_size=1, max_size=2), needs=has_popped)
    def ack(self, picks: list[int]) -> None:
        entries = self._some(picks)
        self.twins.both(lambda buffer: buffer.ack_many(entries))

    @operation(
        4,
        picks=st.lists(any_pick, min_size=1, max_size=2),
        moment_ms=st.none() | any_moment,
        attempts=st.integers(0, 1),
        needs=has_popped,
    )
    def requeue(self, picks: list[int], moment_ms: int | None, attempts: int) -> None:
        entries = self._some(picks)
        not_before_ms = None if moment_ms is None else self._now_ms + moment_ms
        self.twins.both(lambda buffer: buffer.requeue_many(entries, not_before_ms=not_before_ms, attempts=attempts))

    @operation(pick=any_pick, error=st.sampled_from(["error", "\N{SNOWMAN}"]), needs=has_popped)
    def fail(self, pick: int, error: str) -> None:
        entries = self._some([pick])
        self.twins.both(lambda buffer: buffer.fail_many(entries, error))

    @operation(picks=st.lists(any_pick, min_size=1, max_size=2), needs=has_popped)
    def extend(self, picks: list[int]) -> None:
        entries = self._some(picks)
        self.twins.both(lambda buffer: buffer.extend_many(entries))

    # --- dead letters ----------------------------------------------------------------------------------------------

    def _dead(self, picks: list[int]) -> list[str]:
        """Choose runs that are dead letters, and now and then others."""
        sets = self.twins.model.store.sets
        dead = [run_id for key in sorted(sets) if key.endswith(":failed") for run_id in sets[key]]
        return [picked(dead if dead and pick % 7 else list(self.owners), pick) for pick in picks]

    @operation(3, picks=st.lists(any_pick, min_size=1, max_size=3), needs=has_dead)
    def revive(self, picks: list[int]) -> None:
        run_ids = self._dead(picks)
        for outcome in self.twins.both(lambda buffer: buffer.revive_many(run_ids)):
            assert isinstance(outcome, Revival)
            # What the reader says of an entry is what the script says of it.
            if outcome.reply in ("gone", "malformed"):
                assert outcome.fault is not None
            if outcome.reply in ("revived", "alive"):
                assert outcome.fault is None

    @operation(picks=st.lists(any_pick, min_size=1, max_size=2), needs=has_dead)
    def discard(self, picks: list[int]) -> None:
        run_ids = self._dead(picks)
        self.twins.both(lambda buffer: buffer.discard_many(run_ids))

    @operation(pick=any_pick, needs=has_spoilt)
    def mend_an_entry(self, pick: int) -> None:
        """Put back what was spoilt, as an operator might, whatever has become of the entry meanwhile."""
        key, field, value = picked(self.spoilt, pick)
        fields = self.twins.model.store.hashes.get(key)
        if fields is not None and fields.get("state") not in (b"DRAINING", b"MATERIALISED"):
            self.twins.overwrite(key, field, value)

    # --- mending ---------------------------------------------------------------------------------------------------

    @operation(
        ready=any_environment,
        picks=st.lists(st.tuples(any_pick, st.booleans()), min_size=1, max_size=3),
        age_ms=st.sampled_from([0, 20]),
        needs=has_accepted,
    )
    def mend(self, ready: Ready, picks: list[tuple[int, bool]], age_ms: int) -> None:
        """Look at any runs: of that environment, of others, and settled ones."""
        runs = dict.fromkeys((picked(list(self.owners), pick) for pick, _ in picks), "")
        waiting = list(self.twins.model.store.sets.get(self.twins.keyspace.of(ready.org_id).waiting(ready.env_id), {}))
        runs.update((member.partition(":")[2], member) for member in waiting[: sum(has for _, has in picks)])
        self._restore(ready, list(runs.items()), age_ms)
        self._repair(ready)

    def _restore(self, ready: Ready, runs: list[tuple[str, str]], age_ms: int) -> None:
        look = Look(self.twins.keyspace.of(ready.org_id), ready, runs)
        self.twins.both(lambda buffer: buffer.restore_many([look], stalled_ms=age_ms))

    def _repair(self, ready: Ready) -> None:
        self.twins.both(lambda buffer: buffer.repair_many([ready]))

    @operation(token=any_token, other=any_token, lifetime_ms=st.sampled_from([20, 3_000]), stale=st.integers(0, 2))
    def sweep_in_turn(self, token: str, other: str, lifetime_ms: int, stale: int) -> None:
        report = SweepReport(at_ms=self._now_ms, stale=stale, orphans={"queue": stale} if stale else {})
        is_elected = self.twins.both(lambda buffer: buffer.claim_sweep(token, lifetime_ms))
        self.twins.both(lambda buffer: buffer.record_sweep(other, SweepReport(at_ms=1)))
        assert self.twins.both(lambda buffer: buffer.record_sweep(token, report)) == is_elected
        last = self.twins.both(lambda buffer: buffer.last_sweep())
        assert not is_elected or last == report
        self.twins.both(lambda buffer: buffer.release_sweep(other))

    # --- reading ---------------------------------------------------------------------------------------------------

    @operation(pick=any_pick, needs=has_accepted)
    def read_entry(self, pick: int) -> None:
        run_id = picked(list(self.owners), pick)
        org_id = self.owners[run_id].org_id
        (found,) = self.twins.both(lambda buffer: buffer.get_entries(org_id, [run_id]))
        if isinstance(found, Entry):
            self.seen.append(found)

    @operation(
        ready=any_environment, newest_first=st.booleans(), from_ms=st.none() | any_moment, limit=st.integers(1, 4)
    )
    def read_lists(self, ready: Ready, newest_first: bool, from_ms: int | None, limit: int) -> None:
        org_id, env_id = ready.org_id, ready.env_id
        beyond = None if from_ms is None else HeldPlace((self._now_ms + from_ms) * 1000, f"run-{limit}")
        self.twins.both(lambda buffer: buffer.ready())
        self.twins.both(lambda buffer: buffer.ready([org_id]))
        self.twins.both(lambda buffer: buffer.counts())
        self.twins.both(lambda buffer: buffer.list_entries(org_id, env_id))
        self.twins.both(lambda buffer: buffer.bound_run(org_id, DIGESTS[0]))
        self.twins.both(lambda buffer: buffer.held_children(org_id, env_id, f"run-{limit}", limit))
        self.twins.both(
            lambda buffer: buffer.held_places(org_id, env_id, beyond=beyond, newest_first=newest_first, limit=limit)
        )

    @operation(
        org_id=st.none() | any_environment.map(lambda ready: ready.org_id),
        env_id=st.none() | any_environment.map(lambda ready: ready.env_id),
        limit=st.integers(1, 3),
        needs=has_dead,
    )
    def read_dead_letters(self, org_id: str | None, env_id: str | None, limit: int) -> None:
        listed: list[Letter] = []
        place: LetterPlace | None = None
        while True:
            page = self.twins.both(
                lambda buffer, beyond=place: buffer.list_letters(
                    org_id=org_id, env_id=env_id, beyond=beyond, limit=limit
                )
            )
            listed += page.letters
            if (place := page.next) is None:
                break
        assert listed == sorted(listed, key=lambda letter: letter.place, reverse=True)
        if org_id is None and env_id is None:
            sets = self.twins.model.store.sets
            assert len(listed) == sum(len(sets[key]) for key in sets if key.endswith(":failed"))
        run_id = listed[0].run_id if listed else "run-0"
        self.twins.both(lambda buffer: buffer.get_letter(run_id))

    # --- what happens to it ----------------------------------------------------------------------------------------

    @operation(number=st.integers(1, 6), ready=any_environment)
    def count_triggers(self, number: int, ready: Ready) -> None:
        inputs = [GateInputs(org_id=ready.org_id, env_id=ready.env_id)] * number
        self.twins.evaluate(inputs)

    @operation(number=st.integers(1, 3), ready=any_environment)
    def count_requests(self, number: int, ready: Ready) -> None:
        requests = self.twins.keyspace.of(ready.org_id).requests(ready.env_id)
        for _ in range(number):
            self.twins.call(scripts.limit(requests=requests, bucket_us=2_000, buckets=21, limit=3))

    @operation(2, duration_us=st.sampled_from([1, 999, 1_000, 2_000, 11_000, 21_000, 51_000, 101_000, 1_001_000]))
    def pass_time(self, duration_us: int) -> None:
        self.twins.turn(self.twins.now_us + duration_us)

    @operation(3, pick=any_pick, offset_ms=st.sampled_from([-1, 0, 1]))
    def turn_to_where_something_ends(self, pick: int, offset_ms: int) -> None:
        store = self.twins.model.store
        moments = {*store.ends_ms.values()}
        for key, members in store.sets.items():
            if key.endswith(":draining") or ":waiting:" in key:
                moments.update(int(score) for score in members.values())
        coming = sorted(moment for moment in moments if moment > self._now_ms)
        if coming:
            moment_ms = coming[pick % len(coming)] + offset_ms
            self.twins.turn(moment_ms * 1000)

    @operation(pick=any_pick, needs=has_accepted)
    def lose_an_entry(self, pick: int) -> None:
        run_id = picked(list(self.owners), pick)
        self.twins.drop(self.twins.keyspace.of(self.owners[run_id].org_id).entry(run_id))

    @operation(pick=any_pick, member=any_pick)
    def lose_from_an_index(self, pick: int, member: int) -> None:
        """Have an index forget a run, an environment or an organization; held, and the hashes of records, forget none."""
        sets = self.twins.model.store.sets
        indexes = [key for key in sets if ":held:" not in key]
        if indexes:
            key = picked(indexes, pick)
            self.twins.forget(key, picked(list(sets[key]), member))

    @operation(
        pick=any_pick,
        spoilt=st.sampled_from(
            [
                ("payload", None),
                ("seq", b"x"),
                ("attempts", b"-1"),
                ("env", b"org:1/b:c"),
                ("kind", b""),
                ("state", None),
                ("bindings", b"\xff"),
                ("patches", b"9"),
                ("org", b"\xff"),
            ]
        ),
    )
    def spoil_an_entry(self, pick: int, spoilt: tuple[str, bytes | None]) -> None:
        """Spoil what nobody holds: whoever holds an entry knows it to be whole."""
        hashes = self.twins.model.store.hashes
        entries = [key for key in hashes if ":entry:" in key and hashes[key].get("state") != b"DRAINING"]
        if entries:
            key, (field, value) = picked(entries, pick), spoilt
            self.spoilt.append((key, field, hashes[key].get(field)))
            self.twins.overwrite(key, field, value)

    # --- the end ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Whatever has happened, everything that is left comes out, and nothing is left then."""
        for run_id, ready in self.owners.items():
            self._restore(ready, [(run_id, "")], 0)
        for ready in EVERYWHERE:
            self._repair(ready)
        self.twins.turn(self.twins.now_us + 10_000_000)
        while self.twins.both(lambda buffer: buffer.reclaim_expired()).returned:
            pass
        for ready in EVERYWHERE:
            while (entry := self._take(ready)) is not None:
                self._ack(entry)
        counts = self.twins.both(lambda buffer: buffer.counts())
        assert (counts.queued, counts.waiting, counts.organizations) == (0, 0, ())
        assert [run_id for run_id, ready in self.owners.items() if self._is_stuck(run_id, ready)] == []

    def _is_stuck(self, run_id: str, ready: Ready) -> bool:
        """Tell whether an entry that reads as one, and never expires, is on its way still, and nobody is told of it."""
        store, keys = self.twins.model.store, self.twins.keyspace.of(ready.org_id)
        key = keys.entry(run_id)
        reads = self.twins.model.model.reads_as_entry(key, ready.env_id, ready.org_id)
        is_listed = run_id in store.sets.get(keys.failed, {})
        is_on_its_way = reads and store.hashes[key].get("state") in (b"QUEUED", b"DRAINING")
        return is_on_its_way and key not in store.ends_ms and not is_listed

    def _take(self, ready: Ready) -> Entry | None:
        return self.twins.both(lambda buffer: buffer.pop(ready.org_id, ready.env_id))

    def _ack(self, entry: Entry) -> None:
        self.twins.both(lambda buffer: buffer.ack(entry))
