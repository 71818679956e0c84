"""Channels that somebody is subscribed to."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from notifyd.api.guard import Description, Endpoint, Guard, Request
from notifyd.connections.registry import Registry
from notifyd.errors import NotFound
from notifyd.identifiers import timestamp_text
from notifyd.names import channel_name

Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]


class ChannelItem(msgspec.Struct, gc=False):
    """A channel and how many connections are subscribed to it."""

    name: str
    subscriber_count: int


class ChannelsList(msgspec.Struct, gc=False):
    """All channels with at least one subscriber, by name."""

    channels: list[ChannelItem]
    total_channels: int


class ChannelDetails(msgspec.Struct, gc=False):
    """One channel; it exists from its first subscriber to its last."""

    name: str
    subscriber_count: int
    created_at: Time


class Channels:
    """The handlers of /api/v1/channels."""

    def __init__(self, guard: Guard, registry: Registry) -> None:
        self._guard = guard
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

    def all(self, request: Request) -> ChannelsList:
        """GET /api/v1/channels."""
        channels = self._registry.tenant(request.tenant).channels
        items = [
            ChannelItem(name, len(channel.connections))
            for name, channel in sorted(channels.items())
        ]
        return ChannelsList(items, len(items))

    def one(self, request: Request) -> ChannelDetails:
        """GET /api/v1/channels/{name}."""
        name = channel_name(request.path_params["name"], "name")
        channel = self._registry.tenant(request.tenant).channels.get(name)
        if channel is None:
            raise NotFound("Nobody is subscribed to this channel.")
        created_at = timestamp_text(channel.created_at)
        return ChannelDetails(name, len(channel.connections), created_at)
