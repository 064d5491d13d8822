"""Tests of the run engine on Postgres."""

import pytest

# Before anything imports them, so that their asserts explain themselves too.
pytest.register_assert_rewrite("tests.engine_conformance", "tests.postgres.support")
