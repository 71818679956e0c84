"""Which connections a target means, and which of them may receive. Pure: nothing is sent here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from notifyd.connections.connection import Connection
from notifyd.connections.outbox import Recipients
from notifyd.connections.registry import TenantConnections
from notifyd.notification import Audience, Target

NOBODY = Recipients(())


def resolve(tenant: TenantConnections, target: Target) -> Recipients:
    """The local connections of a channel, several channels or a broadcast, each once."""
    if target.type == "broadcast":
        return tenant.recipients
    if target.type == "channel":
        channel = tenant.channels.get(target.names[0])
        return NOBODY if channel is None else channel.recipients
    found = [tenant.channels[name] for name in target.names if name in tenant.channels]
    if not found:
        return NOBODY
    if len(found) == 1:
        return found[0].recipients
    united: dict[Connection, None] = {}
    for channel in found:
        united.update(channel.connections)
    return Recipients(united)


def narrowed(
    recipients: Recipients, audience: Audience, exclude_connection: str | None
) -> Recipients:
    """Those that the audience admits, without the sender's own connection."""
    if exclude_connection is None and audience.type == "All":
        return recipients
    return Recipients(admitted(recipients.connections, audience, exclude_connection))


def admitted(
    connections: Sequence[Connection], audience: Audience, exclude_connection: str | None
) -> Sequence[Connection]:
    """Those that the audience admits, without the sender's own connection."""
    if exclude_connection is not None:
        connections = [
            connection for connection in connections if connection.id != exclude_connection
        ]
    if audience.type == "All":
        return connections
    return [connection for connection in connections if admits(audience, connection)]


def admits(audience: Audience, connection: Connection) -> bool:
    """Whether this connection is within the audience."""
    identity = connection.identity
    return audience.admits(identity.user_id, identity.roles, connection.subscriptions)


def may_await(audience: Audience, user_id: str) -> bool:
    """Whether a user who is away can be within the audience when he returns.

    His roles are asked then; subscriptions end with their connection.
    """
    if audience.type == "Users":
        return user_id in audience.values
    return audience.type != "Channels"


def count_per_channel(
    tenant: TenantConnections, names: Iterable[str], recipients: Recipients
) -> dict[str, int]:
    """How many of the recipients subscribe to each channel."""
    taken_by = set(recipients.connections)
    counts = {}
    for name in names:
        channel = tenant.channels.get(name)
        counts[name] = 0 if channel is None else len(taken_by & channel.connections.keys())
    return counts
