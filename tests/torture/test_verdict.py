"""The verdict on a torture: what the accounts say, and what was left behind or came back late, by the books and in words."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mollifier.cli import main
from mollifier.play.torture import session
from mollifier.play.torture.accounts import close
from mollifier.play.torture.ledger import Ledger
from mollifier.play.torture.render import accounts_table, verdict
from mollifier.play.torture.session import Torture, Tortured

LEASE_S = 2.0
LATE = "1 entries of killed workers were settled later than 4 s, twice the lease"


def tortured(**values: Any) -> Tortured:
    plain = Tortured(
        torture=Torture(seed=3, minutes=1, lease_s=LEASE_S, rate_per_s=50),
        accounts=close(Ledger(), [], seed=3),
        kills={"api": 1, "worker": 1, "valkey": 1, "postgres": 1},
        faults={},
        left_in_buffer=0,
        recovery_s=[],
        recovery_disturbed_s=[],
        seconds=60.0,
        complaints={},
    )
    return plain._replace(**values)


def shown(renderable: object) -> str:
    written = StringIO()
    Console(width=200, file=written).print(renderable)
    return written.getvalue()


@pytest.mark.parametrize(
    ("values", "imbalances"),
    [
        ({}, ()),
        ({"recovery_s": [0.1, 2 * LEASE_S]}, ()),
        ({"recovery_s": [0.1, 2 * LEASE_S + 0.01]}, (LATE,)),
        ({"recovery_disturbed_s": [9 * LEASE_S]}, ()),
        ({"left_in_buffer": 2}, ("2 entries are left in the buffer",)),
        ({"left_in_buffer": 2, "recovery_s": [5.0]}, ("2 entries are left in the buffer", LATE)),
    ],
)
def test_what_comes_back_later_than_twice_the_lease_with_nothing_else_at_fault_is_held_against_the_books(
    values: dict[str, Any], imbalances: tuple[str, ...]
) -> None:
    ended = tortured(**values)
    assert ended.imbalances == imbalances
    assert (ended.record()["balanced"], ended.record()["imbalances"]) == (not imbalances, imbalances)


def test_lateness_is_told_with_its_number_and_its_bound() -> None:
    late = tortured(recovery_s=[1.0, 5.0])
    assert late.record()["recovery_late"] == 1
    assert LATE in shown(verdict(late))
    assert "mollifier torture --seed 3 --minutes 1 --lease-s 2 --rate 50" in shown(verdict(late))
    assert [line.split()[:2] for line in shown(accounts_table(late)).splitlines() if "recovery_late" in line] == [
        ["recovery_late", "1"]
    ]
    assert "The accounts balance" in shown(verdict(tortured(recovery_s=[1.0])))


@pytest.mark.parametrize(("recovery_s", "code"), [([1.0], 0), ([1.0, 5.0], 1)])
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_lateness_is_exit_code_1(
    arguments: list[str], recovery_s: list[float], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def ended(*_: object, **__: object) -> Tortured:
        return tortured(recovery_s=recovery_s)

    monkeypatch.setattr(session, "run_torture", ended)
    with pytest.raises(SystemExit) as exited:
        main(["torture", "--seed", "3", "--log-file", str(tmp_path / "log"), *arguments])
    assert (exited.value.code or 0) == code
