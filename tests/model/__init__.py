"""Models in memory of the buffer's server and of the run engine, each held against the real thing's contract."""

import pytest

# Before anything imports them, so that their asserts explain themselves too.
pytest.register_assert_rewrite("tests.engine_conformance", "tests.postgres.support")
