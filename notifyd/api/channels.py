"""Channels that somebody is subscribed to."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import msgspec
from msgspec import Meta

from notifyd.api.guard import Description, Endpoint, Guard, Request
from notifyd.api.others import ChannelFound, NodeFigures, Others
from notifyd.connections.registry import Registry
from notifyd.errors import NotFound
from notifyd.eventually import Eventually, then
from notifyd.identifiers import timestamp_text
from notifyd.names import channel_name

Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]


class ChannelItem(msgspec.Struct, gc=False):
    """A channel and how many connections are subscribed to it."""

    name: str
    subscriber_count: int


class ChannelsList(msgspec.Struct, gc=False):
    """All channels with at least one subscriber, by name. Of more than 50,000 on one node some are
    only counted by the others."""

    channels: list[ChannelItem]
    total_channels: int


class ChannelDetails(msgspec.Struct, gc=False):
    """One channel; it exists from its first subscriber to its last."""

    name: str
    subscriber_count: int
    created_at: Time


class Channels:
    """The handlers of /api/v1/channels. `others` is None where this is the only node."""

    def __init__(self, guard: Guard, registry: Registry, others: Others | None = None) -> None:
        self._guard = guard
        self._others = others
        self._registry = registry

    def endpoints(self) -> list[Endpoint]:
        """Listing and looking up."""
        return [
            Endpoint(
                self._guard,
                "GET",
                "/api/v1/channels",
                self.all,
                Description("List channels", "Channels", answer=ChannelsList),
                access="read",
            ),
            Endpoint(
                self._guard,
                "GET",
                "/api/v1/channels/{name}",
                self.one,
                Description("Look up a channel", "Channels", answer=ChannelDetails, errors=(404,)),
                access="read",
            ),
        ]

    def all(self, request: Request) -> Eventually[ChannelsList]:
        """GET /api/v1/channels."""
        channels = self._registry.tenant(request.tenant).channels
        counts = Counter({name: len(channel.connections) for name, channel in channels.items()})

        def answer(figures: dict[str, NodeFigures]) -> ChannelsList:
            for node in figures.values():
                counts.update(node.channels)
            items = [ChannelItem(name, count) for name, count in sorted(counts.items())]
            return ChannelsList(items, len(items) + sum(node.more for node in figures.values()))

        elsewhere: Eventually[dict[str, NodeFigures]] = {}
        if self._others is not None:
            elsewhere = self._others.figures(request.tenant)
        return then(elsewhere, answer)

    def one(self, request: Request) -> Eventually[ChannelDetails]:
        """GET /api/v1/channels/{name}."""
        name = channel_name(request.path_params["name"], "name")
        channel = self._registry.tenant(request.tenant).channels.get(name)
        found = []
        if channel is not None:
            found.append(ChannelFound(len(channel.connections), channel.created_at))

        def answer(elsewhere: list[ChannelFound]) -> ChannelDetails:
            everywhere = found + elsewhere
            if not everywhere:
                raise NotFound("Nobody is subscribed to this channel.")
            created_at = timestamp_text(min(each.created_at for each in everywhere))
            subscribers = sum(each.subscribers for each in everywhere)
            return ChannelDetails(name, subscribers, created_at)

        elsewhere: Eventually[list[ChannelFound]] = []
        if self._others is not None:
            elsewhere = self._others.channel(request.tenant, name)
        return then(elsewhere, answer)
