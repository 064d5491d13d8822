"""Reading traces: every way in which a file can be no trace ends in a message with the line to look at."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.play.replay import Score
from mollifier.play.trace import Arrival, TraceError, parse_time, read_trace, survey

HEADER = b"TIMESTAMP,ContextTokens\n"
ROW = b"2023-11-16 18:17:03.9799600,4808\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def offsets(path: Path) -> list[int]:
    return [arrival.offset_ns for arrival in read_trace(path)]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"", 1, "is empty"),
        (b"\n\n", 1, "is empty"),
        (HEADER, 1, "holds no arrivals"),
        (b"2023-11-16 18:17:03.97,1\n2023-11-16 18:17:04.00,2\n", 1, "looks like data"),
        (b"a,b\nx,y\n", 2, "no time in any of its columns (a, b)"),
        (b"TIMESTAMP,a,a\n1,2,3\n", 1, "names the column 'a' twice"),
        (HEADER + ROW + b"\n2023-11-16 18:17:04\n", 4, "has 1 columns where the header has 2"),
        (HEADER + ROW + b"2023-11-16 18:17:04,1,2\n", 3, "has 3 columns"),
        (HEADER + ROW + b"yesterday,1\n", 3, "holds 'yesterday', which is no time"),
        (HEADER + ROW + b",1\n", 3, "holds '', which is no time"),
        (HEADER + ROW + b"2023-13-16 18:17:04,1\n", 3, "no time"),
        (HEADER + ROW + b"nan,1\n", 3, "no time"),
        (HEADER + ROW + b"2023-11-16 18:17:03.9799599,1\n", 3, "earlier than the line before it"),
        (HEADER + ROW + b"2023-11-16 18:17:04,a\0b\n", 3, "NUL byte"),
        (HEADER + ROW + b"2023-11-16 18:17:04,\xff\xfe\n", 3, "not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", 1, "not UTF-8"),
        (HEADER + ROW + b'2023-11-16 18:17:04,"open\n', 3, "is no CSV"),
        (HEADER + ROW + b'2023-11-16 18:17:04,"a"b\n', 3, "is no CSV"),
        (HEADER + b"2023-11-16 18:17:04," + b"x" * 1_100_000, 2, "longer than 1048576 bytes"),
    ],
)
def test_what_is_no_trace_is_told_with_the_line(file: Path, content: bytes, line: int, said: str) -> None:
    file.write_bytes(content)
    with pytest.raises(TraceError) as raised:
        list(read_trace(file))
    assert raised.value.line == line
    assert said in raised.value.detail


@pytest.mark.parametrize(("time", "env", "option"), [("When", None, "--time-column"), (None, "When", "--env-column")])
def test_a_column_that_is_not_there_is_told_with_those_that_are(
    file: Path, time: str | None, env: str | None, option: str
) -> None:
    file.write_bytes(HEADER + ROW)
    with pytest.raises(TraceError, match=f"no column 'When': name one of TIMESTAMP, ContextTokens with {option}"):
        list(read_trace(file, time_column=time, env_column=env))


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_file_that_cannot_be_read_is_told_by_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match="cannot be read") as raised:
        list(read_trace(tmp_path / name))
    assert raised.value.line is None


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01 00:00:00", 0),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1970-01-01 00:00:00.0000001", 100),
        ("1970-01-01 00:00:00,25", 250_000_000),
        ("1970-01-01 01:00:00+01:00", 0),
        ("1970-01-01 01:00:00 +0100", 0),
        ("0", 0),
        ("12.5", 12_500_000_000),
        ("1e1", 10_000_000_000),
        ("-0.5", -500_000_000),
        (" 7 ", 7_000_000_000),
        ("1700000000", 1_700_000_000_000_000_000),
        ("1700000000123", 1_700_000_000_123_000_000),
        ("1700000000123456", 1_700_000_000_123_456_000),
        ("1700000000123456789", 1_700_000_000_123_456_789),
        ("", None),
        ("inf", None),
        ("nan", None),
        ("0x10", None),
        ("1_000", None),
        ("１２", None),  # noqa: RUF001 - digits of another script
        ("2023-02-30 00:00:00", None),
        ("0001-01-01 00:00:00+14:00", None),
        ("2023-11-16", None),
        ("1e99", None),
    ],
)
def test_times_are_read_in_whole_nanoseconds(text: str, ns: int | None) -> None:
    assert parse_time(text) == ns


@given(st.integers(0, 7_000_000_000_000_000), st.integers(0, 9))
def test_a_date_keeps_its_100_ns(microseconds: int, ticks: int) -> None:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    text = f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond:06}{ticks}"
    assert parse_time(text) == microseconds * 1000 + ticks * 100


def test_times_are_relative_to_the_first_arrival_and_may_repeat(file: Path) -> None:
    file.write_bytes(HEADER + ROW + ROW + b"2023-11-16 18:17:04.0319600,3180\n")
    assert offsets(file) == [0, 0, 52_000_000]


def test_the_other_columns_are_the_payload_and_integers_stay_what_they_are(file: Path) -> None:
    file.write_bytes('id,note,when,big,zip\n-7,"a ""b"", ü",3.5,12345678901234567890,00501\n'.encode())
    (arrival,) = read_trace(file, time_column="when")
    assert json.loads(arrival.payload) == {"id": -7, "note": 'a "b", ü', "big": "12345678901234567890", "zip": "00501"}


def test_without_a_timestamp_column_the_first_that_holds_a_time_counts(file: Path) -> None:
    file.write_bytes(b"name,at,size\nx,1.5,3\ny,2.5,4\n")
    assert list(read_trace(file)) == [
        Arrival(0, b'{"name":"x","size":3}'),
        Arrival(1_000_000_000, b'{"name":"y","size":4}'),
    ]


def test_a_byte_order_mark_line_ends_of_windows_and_blank_lines_do_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbftimestamp,a\r\n1,x\r\n\r\n2,y\r\n")
    assert list(read_trace(file)) == [Arrival(0, b'{"a":"x"}'), Arrival(1_000_000_000, b'{"a":"y"}')]


def test_a_limit_stops_before_what_lies_beyond_it(file: Path) -> None:
    file.write_bytes(b"TIMESTAMP\n1\n2\nnonsense\n")
    assert [arrival.offset_ns for arrival in read_trace(file, limit=2)] == [0, 1_000_000_000]


def test_a_survey_counts_arrivals_the_densest_moment_and_the_environments(file: Path) -> None:
    file.write_bytes(b"TIMESTAMP,env\n0,a\n1,b\n1.05,a\n1.1999,c\n1.2,a\n5,b\n")
    seen = survey(read_trace(file, env_column="env"), window_ns=200_000_000)
    assert (seen.arrivals, seen.span_ns, seen.peak, seen.envs) == (6, 5_000_000_000, 3, ("a", "b", "c"))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 300))
def test_the_densest_moment_is_the_most_within_any_span_of_the_windows_length(times: list[int], window: int) -> None:
    times = sorted(times)
    within = [sum(1 for other in times if at <= other < at + window) for at in times]
    assert survey([Arrival(at, b"") for at in times], window_ns=window).peak == max(within)


def test_arrivals_take_turns_among_environments_and_a_columns_values_keep_theirs(file: Path) -> None:
    from mollifier.play.client import Marker

    file.write_bytes(b"TIMESTAMP,env\n0,a\n1,b\n2,a\n4,c\n")
    marker = Marker("m")

    def places(score: Score) -> list[tuple[float, int]]:
        return [(call.at_s, call.tenant) for call in score.calls(score.survey(), marker)]

    assert places(Score(path=file, environments=3, speed=2)) == [(0, 0), (0.5, 1), (1, 2), (2, 0)]
    assert places(Score(path=file, env_column="env")) == [(0, 0), (1, 1), (2, 0), (4, 2)]
    assert places(Score(path=file, env_column="env", environments=2)) == [(0, 0), (1, 1), (2, 0), (4, 0)]


def test_a_column_with_too_many_values_for_an_environment_each_asks_for_fewer(file: Path) -> None:
    file.write_text("TIMESTAMP,user\n" + "".join(f"{n},u{n}\n" for n in range(1001)))
    with pytest.raises(TraceError, match="1001 values, each an environment: spread them over fewer with --envs"):
        Score(path=file, env_column="user").survey()
    assert Score(path=file, env_column="user", environments=10).survey().arrivals == 1001
