"""How deep a JSON text nests, told without parsing it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from mollifier.fields import DEPTH_MAX, nests_too_deep

# Strings full of what might be taken for structure.
texts = st.text(alphabet='[]{}"\\,:ab\n\u00e9', max_size=20)
values = st.recursive(
    st.none() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    match value:
        case list():
            return 1 + max((depth_of(item) for item in value), default=0)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        case dict():
            return 1 + max((depth_of(item) for item in value.values()), default=0)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        case _:
            return 0


@given(value=values, around=st.integers(DEPTH_MAX - 8, DEPTH_MAX + 2), before=st.lists(values, max_size=8))
@example(value="[" * 2 * DEPTH_MAX, around=1, before=[])
@example(value=[], around=DEPTH_MAX - 1, before=[])
@example(value=[], around=DEPTH_MAX, before=[])
@example(value={"]" * 600: ["}" * 600]}, around=DEPTH_MAX - 2, before=["\\", '"'])
@example(value=0, around=0, before=[[]] * 2 * DEPTH_MAX)
def test_a_text_is_too_deep_when_its_value_is(value: Any, around: int, before: list[Any]) -> None:
    for _ in range(around):
        value = [value] if around % 2 else {"[": value}
    value = [*before, value]
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":"))
        assert nests_too_deep(text.encode()) == (depth_of(value) > DEPTH_MAX)
