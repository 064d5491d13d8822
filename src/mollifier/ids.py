"""Ids: of runs, of batches, and of the runs of a batch.

An id is a prefix and 25 characters: the moment in milliseconds, then 82 random bits. Ids made later sort later, which keeps the index
that holds them compact. The runs of a batch have ids that follow from the batch's: whoever sends a batch again, because no answer
came, makes each of its runs once, in whichever store the first call left it. They sort by their index within the batch.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime

BATCH_PREFIX = "batch_"
_RUN_PREFIX = "run_"
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_TIME_DIGITS = 9
_RANDOM_DIGITS = 16
_INDEX_DIGITS = 4

INDEX_MAX = 36**_INDEX_DIGITS - 1
"""The last index that an item of a batch can have."""


def run_id(now: datetime) -> str:
    """Return a new run id."""
    return _RUN_PREFIX + _new(now)


def batch_id(now: datetime) -> str:
    """Return a new batch id."""
    return BATCH_PREFIX + _new(now)


def token() -> str:
    """Return a new token: 64 random bits, in which its owner is told from everybody else."""
    return secrets.token_hex(8)


def item_run_id(batch_id: str, index: int) -> str:
    """Return the id of the run that the batch's item at the index makes; the batch has an id that `batch_id` made."""
    moment = batch_id.removeprefix(BATCH_PREFIX)[:_TIME_DIGITS]
    digest = hashlib.sha256(f"{batch_id}:{index}".encode()).digest()
    rest = _RANDOM_DIGITS - _INDEX_DIGITS
    number = int.from_bytes(digest[:16], "big") % 36**rest
    return f"{_RUN_PREFIX}{moment}{_base36(index, _INDEX_DIGITS)}{_base36(number, rest)}"


def _new(now: datetime) -> str:
    moment = _base36(int(now.timestamp() * 1000), _TIME_DIGITS)
    return moment + _base36(secrets.randbelow(36**_RANDOM_DIGITS), _RANDOM_DIGITS)


def _base36(number: int, digits: int) -> str:
    text = ""
    for _ in range(digits):
        number, digit = divmod(number, 36)
        text = _ALPHABET[digit] + text
    return text
