"""redis-py with hiredis, no more: takes what is published to `notification:*` and forgets it.

`python -m bench.redis_drain <url> <port>`; it listens on the port once it has subscribed.
"""

from __future__ import annotations

import asyncio
import sys

import redis.asyncio
import uvloop


async def drain(url: str, port: int) -> None:
    """Until it is ended."""
    async with redis.asyncio.Redis.from_url(url) as client, client.pubsub() as subscription:
        await subscription.psubscribe("notification:*")
        await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
        async for _ in subscription.listen():
            pass


if __name__ == "__main__":
    uvloop.run(drain(sys.argv[1], int(sys.argv[2])))
