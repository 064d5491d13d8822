"""The limit of an API key's requests, as answers tell of it: `RateLimit` and `RateLimit-Policy`, and 429 beyond it.

The fields are those of the IETF's draft "RateLimit header fields for HTTP", as structured fields (RFC 9651).
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, cast

from litestar import Request

from mollifier.http.problems import RefusedError
from mollifier.http.services import services_of
from mollifier.http.tracing import AsgiScope, AsgiSend
from mollifier.rate_limit import Quota

_QUOTA = "mollifier.quota"
_POLICY = "key"


async def spend(request: Request[Any, Any, Any], org_id: str, key_id: str) -> None:
    """Count the request. Raises RefusedError (429) where the key has made all that it may."""
    limiter = services_of(request).mollifier.rate_limiter
    quota = await limiter.spend(org_id, key_id) if limiter is not None else None
    if quota is None:
        return
    cast("AsgiScope", request.scope)[_QUOTA] = quota
    if not quota.allowed:
        wait_s = _seconds(quota)
        detail = f"This API key has made its {quota.limit} requests of any {quota.window_s} seconds; try again in {wait_s} seconds."
        raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, detail, {"Retry-After": str(wait_s)})


def telling_quota(scope: AsgiScope, send: AsgiSend) -> AsgiSend:
    """Return what sends an answer with the key's quota in its headers, where there is one."""

    async def telling(message: Any) -> None:
        quota = scope.get(_QUOTA)
        if quota is not None and message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_headers(quota)]
        await send(message)

    return telling


def _headers(quota: Quota) -> list[tuple[bytes, bytes]]:
    return [
        (b"ratelimit-policy", f'"{_POLICY}";q={quota.limit};w={quota.window_s}'.encode()),
        (b"ratelimit", f'"{_POLICY}";r={quota.remaining};t={_seconds(quota)}'.encode()),
    ]


def _seconds(quota: Quota) -> int:
    """Return the seconds after which more requests may come, rounded up."""
    return max(1, -(-quota.reset_ms // 1000))
