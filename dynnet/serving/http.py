"""What adapters to servers share: a request's body, taken or refused, and the answer to one that is refused."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

from dynnet.errors import RequestError
from dynnet.serving.door import Door


async def received(request: Request, door: Door) -> bytes:
    """The body of a request; no more of it is read than a door lets through.

    Raises:
        RequestError: it holds no image, or too large a one.
    """
    length = request.headers.get("content-length", "")
    door.check(request.headers.get("content-type", ""), int(length) if length.isdecimal() else None)
    body = bytearray()
    async for part in request.stream():
        body += part
        door.check("", len(body))
    return bytes(body)


def response(answer: object, status: int = 200) -> JSONResponse:
    """An answer; who met a full queue is told when to come again."""
    return JSONResponse(answer, status, {"Retry-After": "1"} if status == 503 else None)


def refusal(error: RequestError) -> JSONResponse:
    """The answer to a request that is refused."""
    return response({"detail": str(error)}, error.status)
