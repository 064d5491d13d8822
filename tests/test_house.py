"""Rules of the house that no linter holds: who reads the environment, what the core imports, that every package is pinned."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mollifier"
MODULES = sorted(PACKAGE.rglob("*.py"))

READS_ENVIRONMENT = {
    "config.py": "turns it into Settings",
    "processes.py": "starts API and workers with it, and has to see which variables overrule the rollout's step",
}
OS_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}

# Everything else in the package is core, and so has to do inside somebody else's application.
EDGES = {
    *(
        "__main__",
        "_child",
        "_guard",
        "audit",
        "child_environment",
        "cli",
        "config",
        "development",
        "doctor",
        "embedded",
        "http",
        "play",
        "postgres",
    ),
    *("observability", "processes", "rollout", "worker"),
}
CORE = [module for module in MODULES if module.relative_to(PACKAGE).parts[0].removesuffix(".py") not in EDGES]
CORE_IMPORTS = {"msgspec", "opentelemetry", "redis"}


def name_in_package(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def passed_on(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield what is handed to a child process whole: `env=x`, `{**x, ...}` and `x | {...}` look at no variable."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="env", value=value):
                yield value
            case ast.Dict(keys=keys, values=values):
                yield from (value for key, value in zip(keys, values, strict=True) if key is None)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                yield from (left, right)
            case _:
                pass


def environment_reads(source: str) -> Iterator[int]:
    """Yield the lines that read the environment, directly or through a library that does it by itself."""
    tree = ast.parse(source)
    whole = set(passed_on(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name, lineno=line) if name in OS_ENVIRONMENT:
                if node not in whole:
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
    assert list(environment_reads(source))


@pytest.mark.parametrize(
    "source", ["run(env=os.environ)", "run(env={**os.environ, 'A': '1'})", "run(env=os.environ | {'A': '1'})"]
)
def test_handing_the_environment_to_a_child_process_reads_nothing(source: str) -> None:
    assert list(environment_reads(source)) == []


@pytest.mark.parametrize(
    "module", [m for m in MODULES if name_in_package(m) not in READS_ENVIRONMENT], ids=name_in_package
)
def test_only_config_reads_the_environment(module: Path) -> None:
    assert list(environment_reads(module.read_text())) == [], (
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


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    asked: list[str] = [*project["dependencies"], *(r for extra in extras.values() for r in extra)]
    return {requirement_name(r) for r in asked}


def test_every_package_that_is_imported_is_declared() -> None:
    providers = {module: {requirement_name(d) for d in names} for module, names in packages_distributions().items()}
    imported = {i.split(".")[0] for module in MODULES for i in imports(module.read_text())}
    outside = imported - sys.stdlib_module_names - {"mollifier"}
    assert {i for i in outside if not providers.get(i, set()) & declared()} == set(), "name it in pyproject.toml"


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if "==" not in pin] == []
    assert declared() - {requirement_name(pin) for pin in pins} - {"mollifier"} == set(), "add the pins: make lock"
