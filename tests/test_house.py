"""Rules of the house that no linter holds: who reads the environment, what the core imports, that every package is pinned."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mollifier"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Settings come from config.py alone. These hand the environment they were started with to a child process, and read no setting in it.
PASSES_ENVIRONMENT_ON = {"embedded.py", "cli/replay.py"}

OS_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}

# Everything else in the package is core, and so has to do inside somebody else's application.
EDGES = {"__main__", "cli", "config", "embedded", "http", "postgres", "worker"}
CORE = [module for module in MODULES if module.relative_to(PACKAGE).parts[0].removesuffix(".py") not in EDGES]
CORE_IMPORTS = {"msgspec", "opentelemetry", "redis"}


def name_in_package(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def environment_uses(source: str) -> Iterator[int]:
    """Yield the lines that read the environment, directly or through a library that does it by itself."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name, lineno=line) if name in OS_ENVIRONMENT:
                yield line
            case ast.ImportFrom(module="os", names=names, lineno=line) if OS_ENVIRONMENT & {n.name for n in names}:
                yield line
            case ast.keyword(arg="envvar", lineno=line) | ast.ImportFrom(module="pydantic_settings", lineno=line):
                yield line
            case ast.Import(names=names, lineno=line) if any(n.name == "pydantic_settings" for n in names):
                yield line
            case _:
                pass


def imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything that the source imports, at any depth of it."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (n.name for n in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (f"{module}.{n.name}" for n in names)
            case _:
                pass


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A']",
        "import os\nos.getenv('A')",
        "from os import environ",
        "from pydantic_settings import BaseSettings",
        "typer.Option(envvar='A')",
    ],
)
def test_each_way_of_reading_the_environment_is_noticed(source: str) -> None:
    assert list(environment_uses(source))


@pytest.mark.parametrize("module", MODULES, ids=name_in_package)
def test_only_config_reads_the_environment(module: Path) -> None:
    if name_in_package(module) in {"config.py", *PASSES_ENVIRONMENT_ON}:
        return
    assert list(environment_uses(module.read_text())) == [], (
        "take it from Settings; config.py is where the environment is read"
    )


@pytest.mark.parametrize("module", CORE, ids=name_in_package)
def test_the_core_imports_only_what_a_host_application_can_be_asked_to_have(module: Path) -> None:
    imported = set(imports(module.read_text()))
    outside = {i for i in imported if i.split(".")[0] not in {"mollifier", *CORE_IMPORTS, *sys.stdlib_module_names}}
    beyond_the_api = {i for i in imported if i.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))}
    edges = {i for i in imported if i.startswith("mollifier.") and i.split(".")[1] in EDGES}
    assert outside | beyond_the_api | edges == set()


def requirement_name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    asked: list[str] = [*project["dependencies"], *(r for extra in extras.values() for r in extra)]
    pins = [line for line in (ROOT / "requirements" / "dev.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if "==" not in pin] == []
    missing = {requirement_name(r) for r in asked} - {requirement_name(pin) for pin in pins} - {"mollifier"}
    assert missing == set(), "add the pins: make lock"
