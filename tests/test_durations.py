from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.durations import DURATION_MAX, format_duration, parse_duration, parse_moment


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("10s", 10), ("90m", 5400), ("1h30m", 5400), ("2d", 172_800), ("1w", 604_800), ("1w2d3h4m5s", 788_645)],
)
def test_units_add_up(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "10", "10 s", "10s5m", "1s1s", "1.5h", "-1s", "+1s", "1h30", "10ms", "1H", "1s\n"]
)
def test_what_is_not_in_the_grammar_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ValueError, match="1h30m"):
        parse_duration(text)


@given(st.integers(0, int(DURATION_MAX.total_seconds())))
def test_a_duration_is_read_back_as_it_was_written(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == timedelta(seconds=seconds)


@given(st.text(alphabet="0123456789wdhms", max_size=80))
def test_a_duration_is_read_or_refused(text: str) -> None:
    try:
        duration = parse_duration(text)
    except ValueError:
        return
    assert timedelta(0) <= duration <= DURATION_MAX


@given(st.datetimes(datetime(1970, 1, 1), datetime(2999, 12, 31)), st.integers(-14 * 60, 14 * 60))  # noqa: DTZ001
def test_a_moment_with_an_offset_is_read_as_utc(moment: datetime, offset_minutes: int) -> None:
    utc = moment.replace(tzinfo=UTC)
    hours, minutes = divmod(abs(offset_minutes), 60)
    sign = "-" if offset_minutes < 0 else "+"
    local = moment + timedelta(minutes=offset_minutes) if 1971 < moment.year < 2999 else moment
    text = f"{local.isoformat()}{sign}{hours:02}:{minutes:02}" if local is not moment else f"{moment.isoformat()}Z"
    assert parse_moment(text) == utc


@given(st.text(max_size=40))
def test_a_moment_is_read_or_refused(text: str) -> None:
    try:
        moment = parse_moment(text)
    except ValueError:
        return
    assert 1970 <= moment.year <= 2999
