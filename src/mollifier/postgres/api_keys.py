"""API keys as they are stored: hashed, with as much shown as tells them apart, until they are revoked or their overlap has passed."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

import msgspec
from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mollifier.errors import ConflictError, FieldError, InvalidRequestError, NotFoundError
from mollifier.postgres.tables import api_keys

OVERLAP_DEFAULT = timedelta(days=1)
OVERLAP_MAX = timedelta(days=90)
_KEY_BYTES = 32
_SHOWN_RANDOM_CHARACTERS = 6


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of an API key: `prefix` tells it apart in a list, the key itself is not known any more.

    It works until `revoked_at` is set or `expires_at` is past.
    """

    id: str
    env_id: str
    prefix: str
    created_at: datetime
    revoked_at: datetime | None = None
    expires_at: datetime | None = None
    last_used_at: datetime | None = None


class NewApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key that was just made; `secret` is shown this once."""

    key: ApiKey
    secret: str


class Rotation(msgspec.Struct, frozen=True, kw_only=True):
    """A key that was just made in the place of another, which works until it expires."""

    created: NewApiKey
    replaced: ApiKey


def key_hash(secret: str) -> bytes:
    """Return what is stored of a key. Keys are random beyond guessing, so a plain SHA-256 keeps them."""
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()


def new_key(env_id: str, environment_name: str) -> tuple[str, dict[str, Any]]:
    """Return a new key for the environment, and the row that is kept of it."""
    lead = f"tr_{environment_name}_"
    secret = lead + secrets.token_urlsafe(_KEY_BYTES)
    row = {
        "id": f"key_{secrets.token_hex(12)}",
        "environment_id": env_id,
        "prefix": secret[: len(lead) + _SHOWN_RANDOM_CHARACTERS],
        "key_hash": key_hash(secret),
    }
    return secret, row


async def insert_key(connection: AsyncConnection, env_id: str, environment_name: str) -> NewApiKey:
    """Make a key for an environment that exists."""
    secret, row = new_key(env_id, environment_name)
    made = await connection.execute(insert(api_keys).values(row).returning(*api_keys.c))
    return NewApiKey(key=api_key(made.one()), secret=secret)


async def revoke(connection: AsyncConnection, env_id: str, key_id: str) -> ApiKey:
    """Revoke the key for good; a revoked one stays as it is. Raises NotFoundError."""
    statement = (
        update(api_keys)
        .where(api_keys.c.id == key_id, api_keys.c.environment_id == env_id)
        .values(revoked_at=func.coalesce(api_keys.c.revoked_at, func.now()))
        .returning(*api_keys.c)
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        raise _unknown(key_id)
    return api_key(row)


async def rotate(
    connection: AsyncConnection, env_id: str, environment_name: str, key_id: str, overlap: timedelta
) -> Rotation:
    """Within a transaction: make a key, and have the given one expire when the overlap has passed.

    Raises NotFoundError; ConflictError for a key that was revoked or replaced already, so that a rotation sent twice makes one key;
    InvalidRequestError (field `overlap`).
    """
    if not timedelta(0) <= overlap <= OVERLAP_MAX:
        raise InvalidRequestError(FieldError("overlap", f"must be at most {OVERLAP_MAX.days}d"))
    mine = (api_keys.c.id == key_id) & (api_keys.c.environment_id == env_id)
    found = (await connection.execute(select(api_keys).where(mine).with_for_update())).one_or_none()
    if found is None:
        raise _unknown(key_id)
    if found.revoked_at is not None:
        raise ConflictError("This key is revoked, so there is nothing to replace; create a new key.", "keyId")
    if found.expires_at is not None:
        raise ConflictError(
            "This key was replaced already; rotate the newer key, or revoke this one to end it early.", "keyId"
        )
    expiring = update(api_keys).where(mine).values(expires_at=func.now() + overlap).returning(*api_keys.c)
    replaced = api_key((await connection.execute(expiring)).one())
    return Rotation(created=await insert_key(connection, env_id, environment_name), replaced=replaced)


def api_key(row: Row[Any]) -> ApiKey:
    """Return what a row says."""
    return ApiKey(
        id=row.id,
        env_id=row.environment_id,
        prefix=row.prefix,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
    )


def _unknown(key_id: str) -> NotFoundError:
    return NotFoundError("API key", key_id, "keyId", "List them with `mollifier key list`.")
