"""The Postgres run engine does what every run engine must."""

# ruff: noqa: F403
# pyright: reportWildcardImportFromLibrary=false
from tests.engine_conformance import *
