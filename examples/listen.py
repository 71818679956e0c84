"""Listen as a user: `python examples/listen.py http://localhost:8081 TOKEN orders alerts`."""

# ruff: noqa: T201 (an example prints what it does)

from __future__ import annotations

import asyncio
import sys

from notifyd.client import AsyncClient, Disconnected, Event, Gap


def told(event: Event) -> None:
    match event:
        case Gap():
            print(f"something of {event.stream} was missed ({event.reason}): load it anew")
        case Disconnected():
            print(f"away ({event.code} {event.reason}), back in {event.retry_in} s")
        case _:
            pass


async def main(url: str, token: str, *channels: str) -> None:
    # Instead of a token, a function that fetches one outlives the first one's end.
    async with AsyncClient(url, token=token) as notifications:
        async for notification in notifications.listen(channels, on_event=told):
            print(notification.event_type, notification.payload)
            await notification.ack()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
