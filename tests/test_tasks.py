"""Tasks: which functions of a module are offered, under which ids, and what a bad module says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mollifier.errors import SettingsError
from mollifier.tasks import TaskContext, accepts_context, discover, task


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for modules that are importable during the test only."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, name: str, source: str) -> str:
    (folder / f"{name}.py").write_text(source)
    return name


def test_a_module_offers_its_own_public_functions_each_under_its_name(folder: Path) -> None:
    module = write(
        folder,
        "offering",
        "from os.path import join\n"
        "class Helper: ...\n"
        "CONSTANT = 1\n"
        "def send(payload): ...\n"
        "async def charge(payload, context): ...\n"
        "def _private(payload): ...\n",
    )

    assert sorted(discover([module])) == ["charge", "send"]


def test_a_task_may_have_any_printable_text_as_its_id(folder: Path) -> None:
    source = "from mollifier.tasks import task\n@task('billing/refund \\u2713')\ndef refund(payload): return payload\n"
    module = write(folder, "renamed", source)

    tasks = discover([module])

    assert list(tasks) == ["billing/refund \u2713"]
    assert tasks["billing/refund \u2713"](3) == 3


def test_modules_are_offered_together_and_one_may_be_named_twice(folder: Path) -> None:
    first = write(folder, "first_of_two", "def a(payload): ...\n")
    second = write(folder, "second_of_two", "def b(payload): ...\n")

    assert sorted(discover([first, second, first])) == ["a", "b"]
    assert discover([]) == {}


def test_two_tasks_of_one_id_are_refused(folder: Path) -> None:
    first = write(folder, "first_same", "def send(payload): ...\n")
    second = write(folder, "second_same", "def send(payload): ...\n")

    with pytest.raises(SettingsError, match="MOLLIFIER_TASKS: two tasks are called 'send'"):
        discover([first, second])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nothing_of_this_name", "cannot be imported: No module named 'nothing_of_this_name'"),
        ("def broken(:", "cannot be imported"),
        ("raise RuntimeError('at import')", "cannot be imported: at import"),
        ("VALUE = 1", "defines no public function"),
        ("from os.path import join", "defines no public function"),
    ],
)
def test_a_module_that_offers_nothing_names_the_variable_and_the_reason(folder: Path, source: str, reason: str) -> None:
    module = write(folder, "offers_nothing", source)

    with pytest.raises(SettingsError, match=f"MOLLIFIER_TASKS: module 'offers_nothing' {reason}"):
        discover([module])


def test_a_module_that_is_not_there_names_the_variable() -> None:
    with pytest.raises(SettingsError, match="MOLLIFIER_TASKS: module 'not_there_at_all' cannot be imported"):
        discover(["not_there_at_all"])


def test_only_a_second_positional_parameter_receives_the_context() -> None:
    def one(payload: object) -> None: ...
    def two(payload: object, context: TaskContext) -> None: ...
    def keyword_only(payload: object, *, context: object = None) -> None: ...
    def variadic(*arguments: object) -> None: ...
    async def awaited(payload: object, context: TaskContext) -> None: ...

    taking = {function.__name__: accepts_context(function) for function in (one, two, keyword_only, variadic, awaited)}

    assert taking == {"one": False, "two": True, "keyword_only": False, "variadic": False, "awaited": True}


def test_a_renamed_function_stays_callable_as_it_was() -> None:
    @task("other/name")
    def function(payload: int) -> int:
        return payload * 2

    assert function(2) == 4
