"""Send from a backend: `python examples/publish.py http://localhost:8081 API_KEY USER`."""

# ruff: noqa: T201 (an example prints what it does)

from __future__ import annotations

import sys

from notifyd.client import Client, Message


def main(url: str, api_key: str, user: str) -> None:
    with Client(url, api_key=api_key) as notifications:
        receipt = notifications.send(
            user=user, event="order.created", payload={"order_id": "A-1001"}, priority="High"
        )
        print(
            f"{receipt.notification_id}: {receipt.outcome}, to {receipt.delivered_to} connections"
        )

        done = notifications.batch(
            [
                Message(channel="orders", event="order.created", payload={"order_id": "A-1001"}),
                Message(broadcast=True, event="maintenance", payload={"minutes": 5}, ttl=0),
            ]
        )
        for result in done.results:
            print(f"{result.index}: {result.outcome} {result.error or ''}")


if __name__ == "__main__":
    main(*sys.argv[1:])
