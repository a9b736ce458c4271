"""The JSON of a request's body, read within bounds of size and time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request

from ..errors import JSON_ERRORS, RequestError, json_fault

MOST_BODY = 4 << 20  # bytes
BODY_SECONDS = 30  # for the whole body to come in


async def read_json(request: Request) -> Any:
    """Returns the JSON of a request's body. Raises RequestError for one that is too large, too
    slow, no JSON, or not said to be."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site may send forms and plain texts unasked, but not this.
        raise RequestError(
            "the content type must be application/json", code="unsupported_media_type", status=415
        )
    try:
        data = await asyncio.wait_for(_body(request), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise RequestError(
            f"the body was not whole after {BODY_SECONDS} s; send it again", status=408
        ) from None
    try:
        return json.loads(data, parse_constant=_no_constant)
    except JSON_ERRORS as error:
        raise RequestError(
            f"the body is no JSON: {json_fault(error)}", code="invalid_json"
        ) from None


async def _body(request: Request) -> bytes:
    too_large = RequestError(
        f"the body has more than {MOST_BODY} bytes; send less", code="body_too_large", status=413
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MOST_BODY:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BODY:
            raise too_large
    return bytes(data)


def _no_constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no number of JSON", name, 0)
