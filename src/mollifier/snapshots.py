"""A snapshot as bytes: MessagePack with field names and without defaults, so that it is small and fields can be added later."""

from __future__ import annotations

import msgspec

from mollifier.errors import NonRetryableError
from mollifier.model import Snapshot

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Snapshot)


def encode(snapshot: Snapshot) -> bytes:
    """Return the payload of the snapshot's entry."""
    return _encoder.encode(snapshot)


def decode(payload: bytes) -> Snapshot:
    """Return the snapshot. Raises NonRetryableError when the bytes are not one: no retry can change that."""
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NonRetryableError(f"the payload is not a snapshot: {error}") from error
