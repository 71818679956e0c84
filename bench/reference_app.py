"""What the usual Python server does: a bare Starlette app, run by stock uvicorn.

It is as fast as such an app gets: msgspec decodes and encodes, nothing is checked, nobody is
asked who he is. `POST /publish` decodes and answers; `/ws` accepts; `POST /fanout` sends to all.
"""

from __future__ import annotations

from uuid import uuid4

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect


class Publish(msgspec.Struct):
    """The body of the channel call, without what is optional."""

    channel: str
    event_type: str
    payload: msgspec.Raw


class Answer(msgspec.Struct):
    """What a publisher is told."""

    success: bool
    notification_id: str
    delivered_to: int


class Message(msgspec.Struct):
    """What a subscriber is told."""

    type: str
    id: str
    occurred_at: str
    event_type: str
    payload: msgspec.Raw
    metadata: dict[str, str]


def build() -> Starlette:
    """The app; each has its own sockets."""
    decoder, encoder = msgspec.json.Decoder(Publish), msgspec.json.Encoder()
    sockets: set[WebSocket] = set()

    def answer(delivered: int) -> Response:
        body = encoder.encode(Answer(delivered > 0, str(uuid4()), delivered))
        return Response(body, media_type="application/json")

    async def publish(request: Request) -> Response:
        decoder.decode(await request.body())
        return answer(0)

    async def fanout(request: Request) -> Response:
        asked = decoder.decode(await request.body())
        text = encoder.encode(
            Message(
                "notification",
                str(uuid4()),
                "2026-01-01T12:00:00.000Z",
                asked.event_type,
                asked.payload,
                {"source": "http-api", "priority": "Normal"},
            )
        ).decode()
        for socket in list(sockets):
            await socket.send_text(text)
        return answer(len(sockets))

    async def ws(socket: WebSocket) -> None:
        await socket.accept()
        sockets.add(socket)
        try:
            while True:
                await socket.receive_text()
        except WebSocketDisconnect:
            sockets.discard(socket)

    return Starlette(
        routes=[
            Route("/publish", publish, methods=["POST"]),
            Route("/fanout", fanout, methods=["POST"]),
            WebSocketRoute("/ws", ws),
        ]
    )
