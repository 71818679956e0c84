"""A connection's way from its handshake to its end, and what its client says on the way.

Both transports and both servers (our sockets, ASGI) drive the same methods; what differs is the
sink behind the outbox.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from notifyd import wire
from notifyd.channel_rules import ChannelRules
from notifyd.cluster.occupancy import Occupancy
from notifyd.cluster.presence import Presence
from notifyd.connections.admission import Admission, Handshake
from notifyd.connections.connection import Connection, State
from notifyd.connections.heartbeat import Heartbeat
from notifyd.connections.outbox import Flusher, Outbox, Sink
from notifyd.connections.registry import Registry
from notifyd.connections.replay import Replayer
from notifyd.dispatch.confirmation import AckAnswer, Confirmations
from notifyd.errors import (
    ConnectionLimit,
    Forbidden,
    Internal,
    NotifydError,
    RateLimited,
    ShuttingDown,
    TokenExpired,
    Unauthorized,
    Unavailable,
    UserConnectionLimit,
    ValidationError,
)
from notifyd.eventually import Eventually, is_awaitable, settled, then
from notifyd.identifiers import canonical_uuid, new_uuid
from notifyd.identity import Identity
from notifyd.metrics import Metrics
from notifyd.names import channel_name
from notifyd.ratelimit.base import RateExceeded, Verdict
from notifyd.ratelimit.limits import RateLimits, network
from notifyd.ratelimit.messages import MessageBudget
from notifyd.tenants import TenantLimits

AUTH_SECONDS = 10.0
MAX_AUTHENTICATING = 1000
MAX_AUTHENTICATING_PER_ADDRESS = 20
MAX_TOKEN_MESSAGE_BYTES = 16384
MAX_WAITING_MESSAGES = 100
MAX_ACK_IDS = 100
LIMIT_RETRY_AFTER = 30
RETRY_OF_A_DAY_MS = 86_400_000

GOING_AWAY = 1001
INTERNAL_ERROR = 1011
NOT_AUTHENTICATED = 4001
FORBIDDEN = 4003
TOO_SLOW = 4008
GIVEN_UP = 4009
TOKEN_EXPIRED = 4010
NOTHING_HEARD = 4012

_REASONS = {
    1000: "client",
    1001: "shutdown",
    1002: "protocol_error",
    1007: "invalid_utf8",
    1009: "too_big",
    1011: "internal",
    4001: "unauthorized",
    4003: "forbidden",
    4008: "slow",
    4009: "evicted",
    4010: "token_expired",
    4012: "idle",
    4029: "rate_limited",
}


def reason_for(close_code: int) -> str:
    """How the metrics call a close with this code."""
    return _REASONS.get(close_code, "other")


class Limits(msgspec.Struct, frozen=True):
    """How many connections there may be of all tenants together, and how they live. `of_tenant` has
    what each tenant may have, as it is now."""

    max_connections: int
    evict_on_user_limit: bool
    heartbeat_interval: float
    of_tenant: Callable[[str], TenantLimits]


class Lifecycle:
    """Opens, serves and closes connections."""

    def __init__(
        self,
        *,
        registry: Registry,
        flusher: Flusher,
        confirmations: Confirmations,
        replayer: Replayer,
        heartbeat: Heartbeat,
        admission: Admission,
        verify: Callable[[str], Eventually[Identity]],
        rules: ChannelRules,
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float],
        spread: Callable[[float, float], float],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        presence: Presence | None = None,
        occupancy: Occupancy | None = None,
        rate_limits: RateLimits | None = None,
    ) -> None:
        self.registry = registry
        self.admission = admission
        self._flusher = flusher
        self._confirmations = confirmations
        self._replayer = replayer
        self._heartbeat = heartbeat
        self._verify = verify
        self._rules = rules
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._spread = spread
        self._spawn = spawn
        self._presence = presence
        self._occupancy = occupancy
        self._rate_limits = rate_limits
        self._log = structlog.get_logger("notifyd.connections")
        self.draining = False
        self._authenticating: dict[Connection, Any] = {}
        self._authenticating_per_address: dict[str, int] = {}
        self._verifying: dict[Connection, list[bytes | str]] = {}

    # --- coming ---

    def admit(self, handshake: Handshake) -> Eventually[Identity | None]:
        """Who a handshake's client is, if there is room for him; None for one that is to send Auth.

        Raises what `check_rate`, `Admission.identify` and `check_room` raise.
        """
        if self._rate_limits is None:
            return self._identify(handshake)
        within_rate = self.check_rate(handshake)
        if is_awaitable(within_rate):
            return self._identify_later(handshake, within_rate)
        return self._identify(handshake)

    async def _identify_later(
        self, handshake: Handshake, within_rate: Awaitable[None]
    ) -> Identity | None:
        await within_rate
        return await settled(self._identify(handshake))

    def _identify(self, handshake: Handshake) -> Eventually[Identity | None]:
        def with_room(identity: Identity | None) -> Identity | None:
            self.check_room(handshake, identity)
            return identity

        return then(self.admission.identify(handshake), with_room)

    def check_rate(self, handshake: Handshake) -> Eventually[None]:
        """Count a handshake, before anything is looked at that costs more.

        Raises RateExceeded, at once or when awaited, where its address has had too many.
        """
        if self._rate_limits is None:
            return None
        return then(self._rate_limits.connection(handshake.address), _check_connections)

    def check_room(self, handshake: Handshake, identity: Identity | None) -> None:
        """Whether one more connection may come, before anything is promised to it.

        Raises ShuttingDown, ConnectionLimit or UserConnectionLimit.
        """
        if self.draining:
            raise ShuttingDown("The server is shutting down.", retry_after=self.reconnect_after())
        limits = self._limits
        if len(self.registry) + len(self._authenticating) >= limits.max_connections:
            raise ConnectionLimit(
                "The server holds as many connections as it may.", retry_after=LIMIT_RETRY_AFTER
            )
        if identity is None:
            here = self._authenticating_per_address.get(network(handshake.address), 0)
            if (
                len(self._authenticating) >= MAX_AUTHENTICATING
                or here >= MAX_AUTHENTICATING_PER_ADDRESS
            ):
                raise ConnectionLimit(
                    "Too many connections wait for authentication.", retry_after=int(AUTH_SECONDS)
                )
        else:
            self._check_room_of(identity)

    def _check_room_of(self, identity: Identity) -> None:
        """Whether the user and his tenant may have one more connection; one that is given up for it
        makes room."""
        tenant = self.registry.tenant(identity.tenant)
        limits = self._limits.of_tenant(identity.tenant)
        his = len(tenant.of_user(identity.user_id))
        if his >= limits.max_connections_per_user:
            if self._limits.evict_on_user_limit:
                return
            raise UserConnectionLimit(
                f"This user has {his} connections, as many as one user may have.",
                retry_after=LIMIT_RETRY_AFTER,
            )
        if self._is_full(identity.tenant, len(tenant.connections), limits.max_connections):
            raise ConnectionLimit(
                "This tenant has as many connections as it may have.",
                retry_after=LIMIT_RETRY_AFTER,
            )

    def _is_full(self, tenant: str, here: int, most: int) -> bool:
        """Whether a tenant has as many connections as it may have, at all nodes together."""
        occupancy = self._occupancy
        if here >= most or occupancy is None:
            return here >= most
        if here + occupancy.elsewhere(tenant) < most:
            return False
        occupancy.doubt(tenant)
        return True

    def connect(
        self,
        handshake: Handshake,
        identity: Identity | None,
        sink: Sink,
        *,
        opening: bytes = b"",
    ) -> Connection:
        """A connection for a handshake that was accepted; without an identity it waits for Auth.

        The sink must be able to write already. `opening` is written before anything else, by the
        caller's `Outbox.flush`, which must follow.
        """
        connection = Connection(
            new_uuid(),
            handshake.transport,
            Outbox(self._flusher, sink),
            address=handshake.address,
            user_agent=handshake.user_agent,
            acks=handshake.acks,
            now=self._clock(),
        )
        if opening:
            connection.outbox.will_flush()
            connection.outbox.put(opening)
        if identity is None:
            self._await_auth(connection)
        else:
            try:
                self._open(connection, identity, handshake.channels)
            except ConnectionLimit as error:
                # Its room was taken between the handshake's answer and now.
                self.close(connection, error.close_code, error.message, error)
        return connection

    def _await_auth(self, connection: Connection) -> None:
        address = network(connection.address)
        here = self._authenticating_per_address.get(address, 0)
        self._authenticating_per_address[address] = here + 1
        self._authenticating[connection] = self._flusher.loop.call_later(
            AUTH_SECONDS, self._auth_timed_out, connection
        )

    def _auth_timed_out(self, connection: Connection) -> None:
        error = Unauthorized(f"No Auth message came within {AUTH_SECONDS:.0f} s.")
        self.close(connection, NOT_AUTHENTICATED, error.message, error)

    def _stop_waiting(self, connection: Connection) -> None:
        timer = self._authenticating.pop(connection, None)
        if timer is None:
            return
        timer.cancel()
        address = network(connection.address)
        left = self._authenticating_per_address[address] - 1
        if left:
            self._authenticating_per_address[address] = left
        else:
            del self._authenticating_per_address[address]

    def _open(
        self, connection: Connection, identity: Identity, channels: Sequence[str] = ()
    ) -> None:
        self._make_room(identity)
        connection.identity = identity
        connection.state = State.OPEN
        # Presence first, then the queue is read: what is published from here on waits behind the
        # replay.
        self.registry.add(connection)
        known = None
        if self._presence is not None:
            known = self._presence.came(identity.tenant, identity.user_id)
        if self._occupancy is not None:
            self._occupancy.changed(identity.tenant)
        self._heartbeat.add(connection)
        self._metrics.connections_opened_total.labels(connection.transport).inc()
        if connection.transport == "sse":
            connection.outbox.put(wire.sse_retry(int(self._spread(1000, 5000))))
        granted = [name for name in identity.subscribe if self._subscribe(connection, name)]
        connection.offer(
            wire.connected_message(
                connection.id,
                identity.user_id,
                expires_at=identity.expires_at,
                heartbeat_interval=self._limits.heartbeat_interval,
                subscriptions=granted,
            )
        )
        self._tell_without_room(connection, identity.subscribe, granted)
        self._replayer.start(connection, known)
        if channels:
            self._subscribe_asked(connection, channels)

    def _make_room(self, identity: Identity) -> None:
        """Evict the user's connection that was heard from longest ago, where he has too many."""
        # Once more: others may have come while this one was told that it may.
        self._check_room_of(identity)
        connections = self.registry.tenant(identity.tenant).of_user(identity.user_id)
        if not connections:
            return
        most = self._limits.of_tenant(identity.tenant).max_connections_per_user
        surplus = max(0, len(connections) - most + 1)
        for connection in sorted(connections, key=lambda each: each.last_heard)[:surplus]:
            error = UserConnectionLimit("Given up for a newer connection of the same user.")
            self.close(connection, GIVEN_UP, error.message, error)

    # --- speaking ---

    def heard(self, connection: Connection) -> None:
        """A complete frame came, whatever it says."""
        connection.last_heard = self._clock()

    def pong(self, connection: Connection, payload: bytes) -> None:
        """A Pong came: a sign of life, and a confirmation where it answers a Ping of ours."""
        connection.last_heard = self._clock()
        self._confirmations.pong(connection, payload)

    def unsupported(self, connection: Connection) -> None:
        """A binary message came."""
        if self._may_speak(connection):
            self._refuse(connection, UnsupportedFormat("Messages are JSON in text frames."))

    def receive(self, connection: Connection, data: bytes | str) -> None:
        """One text message of the client, valid UTF-8. Never raises; answers go to the outbox."""
        connection.last_heard = self._clock()
        waiting = self._verifying.get(connection)
        if waiting is not None:
            # What follows an Auth whose keys are being fetched waits for its outcome.
            waiting.append(data)
            if len(waiting) > MAX_WAITING_MESSAGES:
                self.close(connection, RateLimited.close_code, "Too many messages wait for Auth.")
            return
        try:
            if connection.state is State.AUTHENTICATING:
                self._receive_auth(connection, data)
            elif connection.state is State.OPEN:
                if self._rate_limits is None:
                    self._handle(connection, wire.decode_client_message(data))
                else:
                    self._handle_within_rate(connection, data)
        except NotifydError as error:
            if connection.state is State.AUTHENTICATING:
                self.close(connection, _auth_close_code(error), error.message, error)
            else:
                self._refuse(connection, error)
        except Exception:  # noqa: BLE001  # a fault of ours costs one connection, and is logged
            self._log.exception("a client message failed", connection_id=connection.id)
            fault = Internal("The server failed.")
            self.close(connection, INTERNAL_ERROR, fault.message, fault)

    def _refuse(self, connection: Connection, error: NotifydError) -> None:
        connection.reply(wire.error_message(error))

    # --- how often ---

    def _handle_within_rate(self, connection: Connection, data: bytes | str) -> None:
        try:
            message = wire.decode_client_message(data)
        except NotifydError:
            if self._may_speak(connection):
                raise
            return
        if isinstance(message, wire.Ack):
            if self._may_ack(connection, message.payload):
                self._handle(connection, message)
        elif self._may_speak(connection):
            self._handle(connection, message)

    def _may_speak(self, connection: Connection) -> bool:
        """Whether one more message of a client is within its rate; it is told where not, and closed
        where it was told before.
        """
        limits = self._rate_limits
        if limits is None:
            return True
        if connection.state is State.CLOSED:
            return False
        now, rate = self._milliseconds(), limits.rates.messages
        budget = connection.budget
        if budget is None:
            budget = connection.budget = MessageBudget(rate, now)
        verdict = limits.messages.count(budget.say(rate, now))
        if verdict.allowed:
            return True
        error = RateExceeded("More messages than a connection may send; this was ignored.", verdict)
        if budget.is_spent(rate):
            self.close(connection, error.close_code, "message rate exceeded", error)
        else:
            self._refuse(connection, error)
        return False

    def _may_ack(self, connection: Connection, payload: wire.AckPayload) -> bool:
        """Whether an ack is of what was delivered, which costs nothing, or else within its rate."""
        limits = self._rate_limits
        if limits is None:
            return True
        ids = set(payload.notification_ids or (payload.notification_id or "",))
        held = connection.unconfirmed or ()
        # What is held gives its credit back when it is let go, which settling it does.
        owed = connection.ack_credit + sum(id in held for id in ids)
        connection.ack_credit -= max(0, min(len(ids), owed))
        if len(ids) <= owed:
            limits.messages.allowed.inc()
            return True
        now, rate = self._milliseconds(), limits.rates.messages
        budget = connection.budget
        if budget is None:
            budget = connection.budget = MessageBudget(rate, now)
        verdict = limits.messages.count(budget.ack(rate, now))
        if not verdict.allowed:
            message = "More acks than were delivered to this connection; this was ignored."
            self._refuse(connection, RateExceeded(message, verdict))
        return verdict.allowed

    def _milliseconds(self) -> int:
        return int(self._clock() * 1000)

    def _handle(self, connection: Connection, message: wire.ClientMessage) -> None:
        if isinstance(message, wire.Ping):
            connection.reply(wire.PONG)
        elif isinstance(message, wire.Subscribe):
            self._subscribe_asked(connection, message.payload.channels)
        elif isinstance(message, wire.Unsubscribe):
            self._unsubscribe_asked(connection, message.payload.channels)
        elif isinstance(message, wire.Ack):
            self._acknowledge(connection, message.payload)
        else:
            self._refresh(connection, message.payload.token)

    # --- authenticating ---

    def _receive_auth(self, connection: Connection, data: bytes | str) -> None:
        if len(data) > MAX_TOKEN_MESSAGE_BYTES:
            raise Unauthorized(f"The Auth message is over {MAX_TOKEN_MESSAGE_BYTES} bytes.")
        message = wire.decode_client_message(data)
        if not isinstance(message, wire.Auth):
            raise Unauthorized(
                "The first message must be Auth, or a token must come with the handshake."
            )
        self._when_verified(connection, message.payload.token, self._authenticated)

    def _when_verified(
        self, connection: Connection, token: str, use: Callable[[Connection, Identity], None]
    ) -> None:
        identity = self._verify(token)
        if is_awaitable(identity):
            self._verifying[connection] = []
            self._spawn(self._verify_later(connection, identity, use))
        else:
            use(connection, identity)

    async def _verify_later(
        self,
        connection: Connection,
        verification: Awaitable[Identity],
        use: Callable[[Connection, Identity], None],
    ) -> None:
        error: NotifydError | None = None
        identity: Identity | None = None
        try:
            identity = await verification
        except NotifydError as refused:
            error = refused
        finally:
            waiting = self._verifying.pop(connection, [])
        if connection.state is State.CLOSED:
            return
        try:
            if error is not None:
                raise error
            if identity is not None:
                use(connection, identity)
        except NotifydError as refused:
            if connection.state is State.OPEN:
                # As where the keys were at hand: a bad new token takes nothing away.
                self._refuse(connection, refused)
            else:
                self.close(connection, _auth_close_code(refused), refused.message, refused)
        for data in waiting:
            self.receive(connection, data)

    def _authenticated(self, connection: Connection, identity: Identity) -> None:
        self._stop_waiting(connection)
        self._open(connection, identity)

    def _refresh(self, connection: Connection, token: str) -> None:
        try:
            self._when_verified(connection, token, self._refreshed)
        except NotifydError as error:
            # The old token holds until it expires; a bad new one takes nothing away.
            self._refuse(connection, error)

    def _refreshed(self, connection: Connection, identity: Identity) -> None:
        before = connection.identity
        if (identity.user_id, identity.tenant) != (before.user_id, before.tenant):
            error = Forbidden("A new token must be of the same user and tenant.")
            self.close(connection, FORBIDDEN, error.message, error)
            return
        self._heartbeat.forget_expiry(connection)
        connection.identity = identity
        self._heartbeat.watch_expiry(connection)
        expires_at = identity.expires_at
        connection.reply(
            wire.message(
                "refreshed", expires_at=None if expires_at is None else wire.second_text(expires_at)
            )
        )
        lost = [
            name for name in connection.subscriptions if self._lost_grant(name, before, identity)
        ]
        self._unsubscribe_asked(connection, lost, tell_none=False)
        new = [name for name in identity.subscribe if name not in before.subscribe]
        gained = [name for name in new if self._subscribe(connection, name)]
        if gained:
            connection.offer(wire.names_message("subscribed", gained))
        self._tell_without_room(connection, new, gained)

    def _lost_grant(self, channel: str, before: Identity, now: Identity) -> bool:
        """Whether a subscription rested on the old token and the new one does not carry it.

        What the server itself subscribed rests on no token and stays.
        """
        if channel in now.subscribe or self._rules.refusal(channel, now) is None:
            return False
        return channel in before.subscribe or self._rules.refusal(channel, before) is None

    # --- channels ---

    def _subscribe(self, connection: Connection, channel: str) -> bool:
        if channel not in connection.subscriptions and len(
            connection.subscriptions
        ) >= self._most_subscriptions(connection.identity):
            return False
        self.registry.subscribe(connection, channel)
        return True

    def _most_subscriptions(self, identity: Identity) -> int:
        return self._limits.of_tenant(identity.tenant).max_subscriptions_per_connection

    def _subscribe_asked(self, connection: Connection, channels: Sequence[str]) -> None:
        """Subscribe to what the rules allow; what they refuse is named, the rest stands."""
        granted: dict[str, None] = {}
        refused: dict[str, str] = {}
        for channel in channels:
            try:
                channel_name(channel)
            except ValidationError as error:
                refused[channel[:64]] = error.message
                continue
            reason = self._rules.refusal(channel, connection.identity)
            if reason is not None:
                refused[channel] = reason
            elif self._subscribe(connection, channel):
                granted[channel] = None
            else:
                refused[channel] = self._no_room(connection)
        if granted or not refused:
            connection.offer(wire.names_message("subscribed", granted))
        self._tell_refused(connection, refused)

    def _no_room(self, connection: Connection) -> str:
        most = self._most_subscriptions(connection.identity)
        return f"a connection may have at most {most} subscriptions"

    def _tell_without_room(
        self, connection: Connection, claimed: Sequence[str], granted: Sequence[str]
    ) -> None:
        """Say which channels of a token's `subscribe` claim were too many."""
        if len(granted) < len(claimed):
            reason = self._no_room(connection)
            self._tell_refused(
                connection, {name: reason for name in claimed if name not in granted}
            )

    def _tell_refused(self, connection: Connection, refused: Mapping[str, str]) -> None:
        if refused:
            told = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:50])
            self._refuse(connection, SubscriptionError(f"Not subscribed: {told}."))

    def _unsubscribe_asked(
        self, connection: Connection, channels: Sequence[str], *, tell_none: bool = True
    ) -> None:
        gone = [
            name for name in dict.fromkeys(channels) if self.registry.unsubscribe(connection, name)
        ]
        if gone or tell_none:
            connection.offer(wire.names_message("unsubscribed", gone))

    def subscribe_user(self, tenant: str, user_id: str, channels: Sequence[str]) -> int:
        """Subscribe a user's live connections from the server, which needs no rule.

        They are told; returns how many connections changed. Raises ValidationError where one has no
        room for them all, and then changes nothing.
        """
        connections = self.check_user_subscriptions(tenant, user_id, channels)
        changed = 0
        for connection in connections:
            new = [
                name
                for name in dict.fromkeys(channels)
                if self.registry.subscribe(connection, name)
            ]
            if new:
                changed += 1
                connection.offer(wire.names_message("subscribed", new))
        return changed

    def check_user_subscriptions(
        self, tenant: str, user_id: str, channels: Sequence[str]
    ) -> Sequence[Connection]:
        """The user's connections; raises ValidationError where one has no room for these
        channels."""
        connections = self.registry.tenant(tenant).of_user(user_id)
        most = self._limits.of_tenant(tenant).max_subscriptions_per_connection
        for connection in connections:
            if len({*connection.subscriptions, *channels}) > most:
                raise ValidationError(
                    f"A connection of this user would have more than {most} subscriptions.",
                    field="channels",
                    constraint=f"at most {most} subscriptions per connection",
                )
        return connections

    def unsubscribe_user(self, tenant: str, user_id: str, channels: Sequence[str]) -> int:
        """Unsubscribe a user's live connections; they are told; returns how many changed."""
        changed = 0
        for connection in self.registry.tenant(tenant).of_user(user_id):
            gone = [
                name
                for name in dict.fromkeys(channels)
                if self.registry.unsubscribe(connection, name)
            ]
            if gone:
                changed += 1
                connection.offer(wire.names_message("unsubscribed", gone))
        return changed

    # --- acks ---

    def _acknowledge(self, connection: Connection, payload: wire.AckPayload) -> None:
        single = payload.notification_ids is None
        asked = payload.notification_ids
        if asked is None and payload.notification_id is not None:
            asked = [payload.notification_id]
        if not asked:
            raise InvalidAck("An Ack names a notification_id, or up to 100 notification_ids.")
        if len(asked) > MAX_ACK_IDS:
            raise InvalidAck(f"An Ack names at most {MAX_ACK_IDS} notifications.")
        ids: list[str] = []
        malformed: list[str] = []
        for id in asked:
            try:
                ids.append(canonical_uuid(id))
            except ValidationError:
                malformed.append(id[:64])
        if single and malformed:
            raise InvalidAck("notification_id is not a UUID.")
        connection.acks = True
        identity = connection.identity
        answer = self._confirmations.acknowledge(
            identity.tenant, identity.user_id, ids, by=connection
        )
        if is_awaitable(answer):
            connection.unanswered += len(asked)
            self._spawn(self._answer_ack_later(connection, answer, len(asked), malformed, single))
        else:
            self._answer_ack(connection, answer, malformed, single)

    async def _answer_ack_later(
        self,
        connection: Connection,
        answer: Awaitable[AckAnswer],
        asked: int,
        malformed: list[str],
        single: bool,
    ) -> None:
        try:
            self._answer_ack(connection, await answer, malformed, single)
        except NotifydError as error:
            self._refuse(connection, error)
        finally:
            connection.answered(asked)

    def _answer_ack(
        self, connection: Connection, answer: AckAnswer, malformed: list[str], single: bool
    ) -> None:
        if single and answer.refused:
            error = InvalidAck(f"{answer.refused[0]} is not yours to acknowledge, or is long gone.")
            self._refuse(connection, error)
            return
        connection.reply(
            wire.acked_message(answer.acked, [*answer.refused, *malformed], single=single)
        )

    # --- going ---

    def too_slow(self, outbox: Outbox) -> None:
        """An outbox is over its bounds."""
        self.close(outbox.connection, TOO_SLOW, "too slow")

    def idle(self, connection: Connection) -> None:
        """Nothing was heard for `idle_timeout`."""
        self.close(connection, NOTHING_HEARD, "nothing heard")

    def token_expired(self, connection: Connection) -> None:
        """The connection's token expired, leeway included."""
        error = TokenExpired("The token expired.")
        self.close(connection, TOKEN_EXPIRED, error.message, error)

    def disconnect(self, connection: Connection, reason: str) -> None:
        """An administrator closes the connection."""
        self.close(connection, FORBIDDEN, reason, Forbidden(reason))

    def close(
        self, connection: Connection, code: int, reason: str, error: NotifydError | None = None
    ) -> None:
        """Close a connection once, with one reason: what waits is written, the client is told why.

        A slow consumer gets its close code only; what it did not confirm goes back to its queue.
        """
        if connection.state is State.CLOSED:
            return
        outbox = connection.outbox
        if code != TOO_SLOW:
            if connection.transport == "sse" and code == GIVEN_UP:
                outbox.put_ahead(wire.sse_retry(RETRY_OF_A_DAY_MS))
            if error is not None:
                connection.reply(wire.error_message(error))
            # Its last words may be too much for its outbox, which then closed it as too slow.
            if outbox.closed:
                return
            outbox.flush_all()
        self._end(connection, reason_for(code))
        outbox.sink.close(code, reason)

    def lost(self, connection: Connection, reason: str = "lost") -> None:
        """The transport ended by itself (`lost`), or its client closed it (`client`)."""
        self._end(connection, reason)

    def _end(self, connection: Connection, reason: str) -> None:
        was = connection.state
        if was is State.CLOSED:
            return
        connection.state = State.CLOSED
        connection.outbox.close()
        self._verifying.pop(connection, None)
        if was is State.AUTHENTICATING:
            self._stop_waiting(connection)
            return
        self.registry.remove(connection)
        if self._presence is not None:
            self._presence.went(connection.identity.tenant, connection.identity.user_id)
        if self._occupancy is not None:
            self._occupancy.changed(connection.identity.tenant)
        self._heartbeat.discard(connection)
        self._replayer.forget(connection)
        self._confirmations.release(connection)
        self._metrics.connections_closed_total.labels(connection.transport, reason).inc()
        self._metrics.connection_duration_seconds.observe(self._clock() - connection.opened_at)

    def replay_again(self, tenant: str, user_id: str, *, before_live: bool = False) -> None:
        """Something went to the log of a user who is connected."""
        for connection in self.registry.tenant(tenant).of_user(user_id):
            self._replayer.again(connection, before_live=before_live)

    # --- shutting down ---

    def reconnect_after(self) -> int:
        """Whole seconds, spread so that not all come back at once."""
        return round(self._spread(1, 10))

    def begin_drain(self) -> list[Connection]:
        """Accept no new connections; returns those to close."""
        self.draining = True
        return [*self.registry, *self._authenticating]

    def go_away(self, connection: Connection, reason: str) -> None:
        """Tell a client that the server stops and when to come back, and close."""
        seconds = self.reconnect_after()
        connection.reply(wire.message("shutdown", reason=reason, reconnect_after_seconds=seconds))
        self.close(connection, GOING_AWAY, "going away")


class SubscriptionError(NotifydError):
    """Channels that were refused; the others of the message are subscribed."""

    code = "SUBSCRIPTION_ERROR"


class InvalidAck(NotifydError):
    """An ack for what is not this user's to acknowledge."""

    code = "INVALID_ACK"


class UnsupportedFormat(NotifydError):
    """A message that is not text."""

    code = "UNSUPPORTED_FORMAT"


def _check_connections(verdict: Verdict) -> None:
    if not verdict.allowed:
        raise RateExceeded("Too many connections from this address.", verdict)


def _auth_close_code(error: NotifydError) -> int:
    """What a connection that could not authenticate is closed with."""
    # A first message that is none says nothing about the server: its 1011 is no close code.
    told = isinstance(error, Unauthorized | ConnectionLimit | Unavailable | Internal)
    return error.close_code if told else NOT_AUTHENTICATED
