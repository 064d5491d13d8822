"""The tasks that the script triggers, beside those of the demo."""

from typing import Any

from mollifier.tasks import task


@task("a/b c")
def same(payload: Any) -> Any:
    return payload


def fail(payload: str) -> None:
    raise ValueError(payload)
