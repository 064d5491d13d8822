import re
import sys
from pathlib import Path

import pytest

from mollifier import config
from mollifier.settings import variable
from mollifier.tasks import discover
from tests.cli.test_main import COMMANDS

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text()


def called_in(page: str) -> set[tuple[str, ...]]:
    """The commands that a page calls, in code or in text."""
    words = re.findall(r"mollifier ((?:[a-z-]+ ?){1,2})", page)
    return {path for path in COMMANDS for call in words if tuple(call.split())[: len(path)] == path}


def examples_in(page: str) -> str:
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_in_its_page(command: tuple[str, ...]) -> None:
    assert command in called_in(examples_in(CLI_PAGE))


def test_the_readme_lists_every_command_and_no_other() -> None:
    rows = re.findall(r"^\| `mollifier ([a-z -]+?)(?: [^`a-z-][^`]*)?`", README, re.MULTILINE)
    assert sorted(rows) == sorted(" ".join(command) for command in COMMANDS)


def settings_table() -> dict[str, str]:
    """The defaults of the README's settings table by variable."""
    return dict(re.findall(r"^\| `(MOLLIFIER_[A-Z_]+)` \| ([^|]*?) \|", README, re.MULTILINE))


def test_the_readme_s_settings_are_those_of_the_code_with_their_defaults() -> None:
    defaults = {each.name: each.value for each in config.describe({})}
    assert settings_table() == {name: f"`{value}`" if value else "" for name, value in defaults.items()}


def test_the_readme_says_of_each_setting_what_the_code_says() -> None:
    for name, line in config.HELP.items():
        (said,) = re.findall(rf"^\| `{variable(name)}` \|[^|]*\| (.*) \|$", README, re.MULTILINE)
        assert said == line.replace("|", "\\|")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_modules_that_the_pages_name_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_]+(?:/|\.py))`", page))
    assert [name for name in sorted(named) if not (ROOT / "src" / "mollifier" / name).exists()] == []


def test_the_readme_s_tasks_are_found_under_the_names_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "readme_tasks.py").write_text(example)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert discover(["readme_tasks"]).keys() == {"send_invoice", "billing/refund"}
