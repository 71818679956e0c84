"""What this node has given to whom of the entries of streams: an entry whose reader died before he
acknowledged it is dispatched again, and must not come twice on one connection."""

from __future__ import annotations

from collections import OrderedDict

from notifyd.notification import Receipt

REMEMBERED = 50_000
"""Recipients and entries, the latest. What is dispatched again was dispatched last before its
reader died: a hundred or two, and as many as he had read at once where Redis was away."""


class Repeats:
    """Remembers the last `limit` of them. Everything is immediate."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._users: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._connected: OrderedDict[str, Receipt] = OrderedDict()

    def given_to_user(self, entry: str, user_id: str) -> int:
        """To how many of a user's connections here an entry went; 0 where it is new to him."""
        return self._users.get((entry, user_id), 0)

    def note_user(self, entry: str, user_id: str, connections: int) -> None:
        """It went to so many of them."""
        self._users[entry, user_id] = connections
        if len(self._users) > self._limit:
            self._users.popitem(last=False)

    def given_to_connected(self, entry: str) -> Receipt | None:
        """What became of an entry for channels or everybody; None where it is new here."""
        return self._connected.get(entry)

    def note_connected(self, entry: str, receipt: Receipt) -> None:
        """Some who are connected here got it."""
        self._connected[entry] = receipt
        if len(self._connected) > self._limit:
            self._connected.popitem(last=False)
