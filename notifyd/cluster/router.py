"""What one node asks of the others: the dispatcher's way, and everybody's, to who is elsewhere.

A notification for a user goes to the nodes that hold him by what Redis knows, one message for each;
one for a channel or for everybody goes to all nodes in one. Each says what became of it. Where
Redis is away, nobody is elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, Protocol

import msgspec
import structlog
from msgspec import Raw

from notifyd.background import BackgroundTasks
from notifyd.cluster.bus import Awaited, Bus
from notifyd.cluster.messages import (
    VERSION,
    Alive,
    Answer,
    Ask,
    BadMessage,
    Body,
    Connected,
    Held,
    Incoming,
    Reached,
    Replay,
    Revoked,
    Routed,
    Settled,
    Spread,
    Told,
    UserOutcome,
    encode_value,
    unwired,
    wired,
)
from notifyd.cluster.nodes import Node, Nodes, script
from notifyd.cluster.occupancy import Occupancy
from notifyd.cluster.presence import Found, Presence, UserKey
from notifyd.connections.registry import Registry
from notifyd.errors import ConfigurationError, Unavailable
from notifyd.log import RateLimitedLog
from notifyd.metrics import Metrics
from notifyd.notification import Notification, Outcome, Target
from notifyd.queue.redis_keys import RedisKeys, bucket_of, member
from notifyd.redis_client import Redis
from notifyd.resilience import BreakerState

ASK_SECONDS = 0.5
"""What the API asks of all nodes waits no longer."""

START_SECONDS = 5.0
"""A node that cannot hear the others by then does not start."""

CAUGHT_UP_AT_ONCE = 100
CATCH_UP_PAUSE = 0.02
MAX_UNTOLD = 10_000
"""Users in whose logs something came while Redis was away for this node, at most: they are told of
it when it is back; others find it when they connect again."""

MAX_REVOCATIONS = 100_000
"""Beyond it the oldest of a tenant become one time for all of it (`lua/revoke.lua`)."""

REVOCATIONS_PER_CALL = 100

Waiting = Sequence[tuple[str, str, Sequence[str]]]
"""Tenant, user and ids of what a node has yet to store."""

Asked = Callable[[Raw], Any]


class Elsewhere(msgspec.Struct, frozen=True, gc=False):
    """What became of a user's notification on other nodes: `delivered` and `routed` count
    connections, `nodes` those that have it or may have it. Not `known`: Redis did not say."""

    delivered: int = 0
    routed: int = 0
    filtered: bool = False
    queued: bool = False
    nodes: int = 0
    known: bool = True


NOWHERE = Elsewhere()
UNKNOWN = Elsewhere(known=False)

FoundElsewhere = dict[str, Elsewhere] | None
"""Those who were found; None where Redis did not say."""


class Spreading(msgspec.Struct, frozen=True, gc=False):
    """What became of a channel's notification, or a broadcast, on other nodes: `delivered` counts
    connections, `silent` the nodes that did not answer in time."""

    delivered: int = 0
    silent: int = 0
    filtered: bool = False
    channels: tuple[int, ...] = ()


class Receiver(Protocol):
    """What the dispatcher does with what other nodes send."""

    def take_for_users(
        self,
        tenant: str,
        users: Sequence[str],
        notification: Notification,
        *,
        exclude: str | None,
        stored: bool,
        shared: bool,
    ) -> list[tuple[UserOutcome, int]]:
        """Offer to the connections of users here, and hold; an outcome for each."""

    def take_for_connected(
        self, tenant: str, target: Target, notification: Notification, exclude: str | None
    ) -> tuple[Outcome, int, Sequence[int]]:
        """Offer to the connections here; the outcome, connections, and those of each channel."""


class ReplayHere(Protocol):
    """What goes to a user's connections here, from his log."""

    def __call__(self, tenant: str, user_id: str, *, before_live: bool = False) -> None: ...


class Cluster:
    """This node among the others.

    Before `start`: `receiver`, `replay_here(tenant, user)`, `settle_here(tenant, user, ids)` (which
    of these were held), `confirmed_here(node, waiting)` (what of it was confirmed; that node is to
    hear of the rest), `revoke_here(tenant, user, at)`, `revocations` (all known here) and
    `give_back(tenant, user, notification)` are set by who makes it, and `answers` what else can be
    asked here. Where `user` of a revocation is empty, it is of all users of the tenant.
    """

    receiver: Receiver
    replay_here: ReplayHere
    settle_here: Callable[[str, str, Sequence[str]], Sequence[str]]
    confirmed_here: Callable[[str, Waiting], Waiting]
    revoke_here: Callable[[str, str, float], None]
    revocations: Callable[[], Sequence[tuple[str, str, float]]]
    give_back: Callable[[str, str, Notification], None]

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        registry: Registry,
        metrics: Metrics,
        *,
        name: str | None,
        lease_seconds: float,
        started_at: float,
    ) -> None:
        cluster_keys = keys.cluster(redis.database)
        self.nodes = Nodes(
            redis,
            cluster_keys,
            name=name,
            lease_seconds=lease_seconds,
            messages=VERSION,
            started_at=started_at,
        )
        self.id = self.nodes.id
        self.presence = Presence(
            redis,
            keys,
            self.id,
            lease_seconds=lease_seconds,
            connections_of=lambda tenant, user: len(registry.tenant(tenant).of_user(user)),
            users=registry.user_keys,
            on_late=self._known_late,
        )
        self.bus = Bus(
            redis, cluster_keys, self.id, metrics, receive=self._receive, on_up=self._heard_again
        )
        self.occupancy = Occupancy(redis, cluster_keys, self.bus, self.nodes, registry)
        self.answers: dict[str, Asked] = {
            "confirmed": lambda about: self.confirmed_here(*_decode_question(about))
        }
        self._redis = redis
        self._keys = keys
        self._cluster_keys = cluster_keys
        self._registry = registry
        self._route = script("route")
        self._revoke = script("revoke")
        self._tasks = BackgroundTasks()
        self._log = structlog.get_logger("notifyd.cluster")
        self._beats_log = RateLimitedLog(self._log)
        self._wake = asyncio.Event()
        self._searching = 0
        self._settled: dict[tuple[str, str], list[str]] = {}
        self._untold: dict[UserKey, None] = {}
        self._catching_up: asyncio.Task[None] | None = None
        self._revocations_kept = True
        self._started = False
        metrics.cluster_nodes.read_from(lambda: len(self.nodes.alive()))
        metrics.cluster_bus_up.read_from(lambda: self.bus.up)

    # --- its life ---

    async def start(self) -> None:
        """Join the cluster. Raises ConfigurationError where Redis cannot be used for it."""
        self._tasks.spawn(self.bus.run())
        try:
            async with asyncio.timeout(START_SECONDS):
                while not self.bus.up:
                    self._wake.clear()
                    await self._wake.wait()
                await self.nodes.beat()
                await self._learn_revocations()
        except (TimeoutError, Unavailable) as error:
            await self._tasks.aclose()
            raise ConfigurationError(
                "redis.url: the nodes of a cluster cannot speak through this Redis; it must let "
                "them subscribe, publish and run scripts."
            ) from error
        self._started = True
        self.bus.to_all(Alive())
        self._redis.breaker.subscribe(self._breaker_changed)
        self._tasks.spawn(self._beat())

    async def stop(self) -> None:
        """Leave the cluster: nobody is found here from now on."""
        self._redis.breaker.unsubscribe(self._breaker_changed)
        self._started = False
        with suppress(Unavailable):
            await self.presence.leave()
            await self.nodes.leave()
        self.bus.to_all(Alive(ending=True))
        self.occupancy.close()
        self.bus.give_up()
        await self._tasks.aclose()

    @property
    def well(self) -> bool:
        """Whether this node hears the others and is known to them."""
        return self.bus.up and self._redis.breaker.state is BreakerState.CLOSED

    def alive(self) -> list[Node]:
        """The nodes whose leases hold, this one first."""
        return self.nodes.alive()

    async def _beat(self) -> None:
        while True:
            try:
                kept = await self.nodes.beat()
                self.occupancy.tell_all()
                self._revocations_kept = self._revocations_kept and kept
                if not self._revocations_kept:
                    await self._revoke_again()
                await self.presence.renew()
                await self._tell_untold()
            except Unavailable as error:
                self._beats_log.warning("this node's lease is not renewed", reason=error.message)
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.nodes.beat_seconds):
                    await self._wake.wait()

    def _breaker_changed(self, state: BreakerState) -> None:
        if state is BreakerState.CLOSED:
            self._wake.set()

    def _heard_again(self, up: bool) -> None:
        """The subscription is there, or lost."""
        self._wake.set()
        if not up or not self._started:
            return
        # What the others said meanwhile is not said again.
        if self._catching_up is not None:
            self._catching_up.cancel()
        self._catching_up = self._tasks.spawn(self._catch_up())

    async def _catch_up(self) -> None:
        """Look for what was meant for users here while this node did not hear it."""
        try:
            await self._learn_revocations()
        except Unavailable:
            # The subscription would hardly be there; what is revoked comes with the next one.
            self._log.warning("the revocations of the cluster cannot be read")
        await self._look_again(list(self._registry.user_keys()))

    def _known_late(self, users: Sequence[UserKey]) -> None:
        """Whoever looked for these users here did not find them until now."""
        self._tasks.spawn(self._look_again(users))

    async def _look_again(self, users: Sequence[UserKey]) -> None:
        """Replay what came to the logs of these users, not to all of them at once."""
        for number, (tenant, user) in enumerate(users, 1):
            self.replay_here(tenant, user)
            if number % CAUGHT_UP_AT_ONCE == 0:
                await asyncio.sleep(CATCH_UP_PAUSE)

    # --- notifications for users ---

    def to_user(
        self,
        tenant: str,
        user: str,
        notification: Notification,
        *,
        exclude: str | None,
        stored: bool,
        patient: bool,
        done: Callable[[Elsewhere], None],
    ) -> None:
        """Hand a notification to the other nodes that hold a user; `done` is called once. What is
        handed over in order arrives in order.

        Nodes have `ANSWER_SECONDS`. Whoever is `patient` waits for Redis, too, until it says who
        they are or its call fails.
        """
        if self._searching:
            # Others are being looked for whose messages must not be overtaken.
            self._search(
                tenant,
                (user,),
                notification,
                exclude=exclude,
                stored=stored,
                patient=patient,
                done=lambda found: done(UNKNOWN if found is None else found.get(user, NOWHERE)),
            )
            return
        awaited = _ToUser(self, tenant, user, notification, stored, patient, done)
        self.bus.add(awaited)
        body = Routed(awaited.seq, tenant, (user,), wired(notification), exclude, stored)
        self._run_route(tenant, user, body, awaited.routed, awaited.unroutable)

    def _run_route(
        self,
        tenant: str,
        user: str,
        body: Body,
        routed: Callable[[list[Any]], None],
        failed: Callable[[], None],
    ) -> None:
        name = member(tenant, user)
        bucket = self._keys.buckets[bucket_of(name)]
        message = self.bus.encoded(body)
        if message is None:
            failed()
            return
        args = (bucket.on, self._cluster_keys.node, self.id, name, message)
        try:
            call = self._redis.run(self._route, (bucket.nodes,), args, routed)
        except Unavailable:
            failed()
        else:
            call.add_done_callback(partial(_failed, failed))

    def reached(self, awaited: Awaited, nodes: int) -> None:
        """So many other nodes have it; where this one does not hear, none can say so."""
        if nodes and not self.bus.up:
            awaited.expected = nodes
            self.bus.overdue(awaited)
        else:
            self.bus.reached(awaited, nodes)

    def to_users(
        self,
        tenant: str,
        users: Sequence[str],
        notification: Notification,
        *,
        exclude: str | None,
        stored: bool,
        patient: bool,
        done: Callable[[FoundElsewhere], None],
    ) -> None:
        """`to_user` for many, one message for each node; those found nowhere are left out of what
        `done` gets."""
        if len(users) > 1 or self._searching:
            self._search(
                tenant,
                users,
                notification,
                exclude=exclude,
                stored=stored,
                patient=patient,
                done=done,
            )
            return
        (user,) = users
        self.to_user(
            tenant,
            user,
            notification,
            exclude=exclude,
            stored=stored,
            patient=patient,
            done=lambda there: done(None if not there.known else {user: there}),
        )

    def _search(
        self,
        tenant: str,
        users: Sequence[str],
        notification: Notification,
        *,
        exclude: str | None,
        stored: bool,
        patient: bool,
        done: Callable[[FoundElsewhere], None],
    ) -> None:
        """Look users up, and then send."""
        known = False
        holders: dict[str, dict[str, int]] = {}
        sent: dict[str, dict[str, int]] = {}

        def finish(awaited: Awaited) -> None:
            done(_of_users(awaited, holders, sent) if known else None)
            if not stored and holders and not awaited.complete:
                awaited.after = self._after(tenant, notification, holders, sent)

        awaited = self.bus.await_answers(Told, finish, patient=patient)
        content = wired(notification)

        def found(all_holders: Found | None) -> None:
            nonlocal known
            known = all_holders is not None
            self._searching -= 1
            for user, nodes in (all_holders or {}).items():
                others = {node: count for node, count in nodes.items() if node != self.id}
                if others:
                    holders[user] = others
                for node in others:
                    places = sent.setdefault(node, {})
                    places[user] = len(places)
            missing = len(sent)
            reached = 0

            def told(node: str, listens: bool) -> None:
                nonlocal missing, reached
                missing -= 1
                reached += listens
                if not listens:
                    for user in sent.pop(node, ()):
                        del holders[user][node]
                        if not holders[user]:
                            del holders[user]
                if not missing:
                    self.reached(awaited, reached)

            several = any(len(nodes) > 1 for nodes in (all_holders or {}).values())
            if not sent:
                self.bus.reached(awaited, 0)
            for node, some in list(sent.items()):
                body = Routed(awaited.seq, tenant, tuple(some), content, exclude, stored)
                self.bus.now_to(node, body, several=several, done=partial(told, node))

        self._searching += 1
        self.presence.find(tenant, users, found)

    def _after(
        self,
        tenant: str,
        notification: Notification,
        holders: dict[str, dict[str, int]],
        sent: dict[str, dict[str, int]],
    ) -> Callable[[Awaited], None]:
        """What is done when a node that was late has answered or never will: who has it nowhere by
        then gets it from his log."""

        def after(awaited: Awaited) -> None:
            for user, nodes in holders.items():
                there = _of_user(awaited, nodes, user, sent)
                if not there.delivered and not there.filtered:
                    self.give_back(tenant, user, notification)

        return after

    # --- notifications for who is connected ---

    def to_connected(
        self,
        tenant: str,
        target: Target,
        notification: Notification,
        *,
        exclude: str | None,
        done: Callable[[Spreading], None],
    ) -> None:
        """Hand a notification to all other nodes; `done` is called once, within
        `ANSWER_SECONDS`."""

        def finish(awaited: Awaited) -> None:
            answers: Sequence[Reached] = tuple(awaited.answers.values())
            # Where Redis has yet to say how many heard it, all may have.
            reached = len(self.alive()) - 1 if awaited.expected is None else awaited.expected
            counts = [each.channels for each in answers if len(each.channels) == len(target.names)]
            done(
                Spreading(
                    sum(each.connections for each in answers),
                    max(0, reached - len(answers)),
                    any(each.filtered for each in answers),
                    tuple(map(sum, zip(*counts, strict=True))),
                )
            )

        if self._redis.breaker.state is not BreakerState.CLOSED:
            done(Spreading())
            return
        kind = target.type
        assert kind in ("broadcast", "channel", "channels")  # noqa: S101  # for the type checker
        awaited = self.bus.await_answers(Reached, finish) if self.bus.up else None
        seq = 0 if awaited is None else awaited.seq
        body = Spread(seq, tenant, kind, target.names, wired(notification), exclude)
        self.bus.to_all(body, awaited)
        if awaited is None:
            # They hear this node, and this node does not hear what they say of it.
            done(Spreading(silent=len(self.alive()) - 1))

    # --- logs, acks and revocations ---

    def replay(self, tenant: str, users: Sequence[str], *, before_live: bool = False) -> None:
        """Something is in the logs of these users: nodes that hold one of them replay it."""
        if len(users) == 1:
            body = Replay(tenant, (users[0],), before_live)
            untold = partial(self._not_told, tenant, users)
            self._run_route(tenant, users[0], body, _pass, untold)
            return

        def found(holders: Found | None) -> None:
            if holders is None:
                self._not_told(tenant, users)
            by_node: dict[str, list[str]] = {}
            for user, nodes in (holders or {}).items():
                for node in nodes:
                    if node != self.id:
                        by_node.setdefault(node, []).append(user)
            for node, some in by_node.items():
                self.bus.to_node(node, Replay(tenant, tuple(some), before_live))

        self.presence.find(tenant, users, found)

    def _not_told(self, tenant: str, users: Sequence[str]) -> None:
        """Redis is away for this node, but maybe not for those who have these users."""
        self._untold.update(dict.fromkeys((tenant, user) for user in users))
        while len(self._untold) > MAX_UNTOLD:
            del self._untold[next(iter(self._untold))]

    async def _tell_untold(self) -> None:
        """Say it now, not all at once; what fails again is told another time."""
        untold, self._untold = self._untold, {}
        for number, (tenant, user) in enumerate(untold, 1):
            self.replay(tenant, (user,))
            if number % CAUGHT_UP_AT_ONCE == 0:
                await asyncio.sleep(CATCH_UP_PAUSE)

    def settled(self, tenant: str, user: str, ids: Sequence[str]) -> None:
        """A device here confirmed what devices elsewhere hold too; told at the end of this turn."""
        if not self._settled:
            asyncio.get_running_loop().call_soon(self._tell_settled)
        self._settled.setdefault((tenant, user), []).extend(ids)

    def _tell_settled(self) -> None:
        settled, self._settled = self._settled, {}
        for (tenant, user), ids in settled.items():
            body = Settled(0, tenant, user, tuple(ids))
            self._run_route(tenant, user, body, _pass, _pass_nothing)

    def settle(self, tenant: str, user: str, ids: Sequence[str]) -> asyncio.Future[frozenset[str]]:
        """Let other nodes go of what they hold for a user; which of these they held, as far as they
        answer in time."""
        future: asyncio.Future[frozenset[str]] = asyncio.get_running_loop().create_future()

        def finish(awaited: Awaited) -> None:
            held = chain.from_iterable(each.ids for each in awaited.answers.values())
            if not future.done():
                future.set_result(frozenset(held))

        awaited = self.bus.await_answers(Held, finish)
        body = Settled(awaited.seq, tenant, user, tuple(ids))

        def routed(answer: list[Any]) -> None:
            self.reached(awaited, sum(map(bool, answer[3::3])))

        self._run_route(tenant, user, body, routed, lambda: self.bus.reached(awaited, 0))
        return future

    async def settle_confirmed(self, waiting: Waiting) -> None:
        """Settle here what of this was confirmed on other nodes, as far as they
        remember it and answer within `ASK_SECONDS`; of the rest, they tell when it is."""
        try:
            answers = await self.ask("confirmed", (self.id, waiting))
        except Unavailable:
            return
        for node, said in answers.items():
            try:
                confirmed = _decode_waiting(said)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                self.bus.tell_bad(node, str(error))
                continue
            for tenant, user, ids in confirmed:
                self.settle_here(tenant, user, ids)

    def tell_settled(self, node: str, tenant: str, user: str, id: str) -> None:
        """Tell a node that asked for it."""
        self.bus.to_node(node, Settled(0, tenant, user, (id,)))

    async def revoke(self, tenant: str, user: str, at: float) -> None:
        """Refuse a user's tokens on all nodes, those that start later too. Raises Unavailable."""
        await self._redis.run(
            self._revoke, (self._cluster_keys.revoked,), (tenant, user, at, MAX_REVOCATIONS)
        )
        self.bus.to_all(Revoked(tenant, user, at))

    async def _learn_revocations(self) -> None:
        answer = await self._redis.command(
            "ZRANGE", self._cluster_keys.revoked, 0, -1, "WITHSCORES"
        )
        for place in range(0, len(answer), 2):
            tenant, _, user = answer[place].decode().partition(_NUL)
            self.revoke_here(tenant, user, float(answer[place + 1]))

    async def _revoke_again(self) -> None:
        """Redis may have lost what was revoked, and nodes that began since never heard of it."""
        known = self.revocations()
        for start in range(0, len(known), REVOCATIONS_PER_CALL):
            some = known[start : start + REVOCATIONS_PER_CALL]
            words: list[str | float] = []
            for tenant, user, at in some:
                words += (at, f"{tenant}{_NUL}{user}")
            if await self._redis.command("ZADD", self._cluster_keys.revoked, "GT", "CH", *words):
                for each in some:
                    self.bus.to_all(Revoked(*each))
        self._revocations_kept = True

    # --- questions of the API ---

    async def find(self, tenant: str, users: Sequence[str]) -> Found:
        """The nodes that hold these users; nobody is found where Redis does not answer in
        `ASK_SECONDS`."""
        future: asyncio.Future[Found | None] = asyncio.get_running_loop().create_future()

        def found(holders: Found | None) -> None:
            if not future.done():
                future.set_result(holders)

        self.presence.find(tenant, users, found)
        with suppress(TimeoutError):
            async with asyncio.timeout(ASK_SECONDS):
                return await future or {}
        return {}

    async def ask(self, what: str, about: object = None) -> dict[str, Raw]:
        """What the other nodes answer, in msgpack, within `ASK_SECONDS`; those that do not know the
        question, or are silent, are left out. Raises Unavailable where none can be asked."""
        if not self.well:
            raise Unavailable("The other nodes cannot be asked.", retry_after=1)
        future: asyncio.Future[dict[str, Raw]] = asyncio.get_running_loop().create_future()

        def finish(awaited: Awaited) -> None:
            if not future.done():
                said = {node: each.said for node, each in awaited.answers.items()}
                known = {node: each for node, each in said.items() if bytes(each) != _NOTHING}
                future.set_result(known)

        awaited = self.bus.await_answers(Answer, finish, seconds=ASK_SECONDS)
        self.bus.to_all(Ask(awaited.seq, what, Raw(encode_value(about))), awaited)
        return await future

    # --- what the others say ---

    def _receive(self, incoming: Incoming, body: Body) -> None:
        match body:
            case Routed():
                self._routed(incoming, body)
            case Spread():
                self._spread(incoming, body)
            case Replay():
                for user in body.users:
                    self.replay_here(body.tenant, user, before_live=body.before_live)
            case Settled():
                held = self.settle_here(body.tenant, body.user, body.ids)
                if body.seq > 0:
                    self.bus.to_node(incoming.sender, Held(body.seq, tuple(held)))
            case Revoked():
                self.revoke_here(body.tenant, body.user, body.at)
            case Ask():
                self._asked(incoming, body)
            case Connected():
                self.occupancy.learn(incoming.sender, body)
            case Alive():
                if body.ending:
                    self.nodes.forget(incoming.sender)
                # Who there is stands in Redis.
                self._wake.set()

    def _routed(self, incoming: Incoming, body: Routed) -> None:
        results = self.receiver.take_for_users(
            body.tenant,
            body.users,
            unwired(body.notification),
            exclude=body.exclude,
            stored=body.stored,
            shared=incoming.several,
        )
        if body.seq > 0:
            self.bus.to_node(incoming.sender, Told(body.seq, tuple(results)))

    def _spread(self, incoming: Incoming, body: Spread) -> None:
        target = Target(body.target, body.names)
        outcome, connections, channels = self.receiver.take_for_connected(
            body.tenant, target, unwired(body.notification), body.exclude
        )
        if body.seq > 0:
            filtered = outcome is Outcome.FILTERED
            answer = Reached(body.seq, connections, filtered, tuple(channels))
            self.bus.to_node(incoming.sender, answer)

    def _asked(self, incoming: Incoming, body: Ask) -> None:
        answer = self.answers.get(body.what)
        said = _NOTHING
        if answer is not None:
            try:
                said = encode_value(answer(body.about))
            except msgspec.MsgspecError as error:
                raise BadMessage("shape", str(error)) from error
        self.bus.to_node(incoming.sender, Answer(body.seq, Raw(said)))


class _ToUser(Awaited):
    """What became of a notification for one user, by far the most common case."""

    __slots__ = (
        "_cluster",
        "_done",
        "_holders",
        "_known",
        "_notification",
        "_stored",
        "_tenant",
        "_user",
    )

    def __init__(
        self,
        cluster: Cluster,
        tenant: str,
        user: str,
        notification: Notification,
        stored: bool,
        patient: bool,
        done: Callable[[Elsewhere], None],
    ) -> None:
        super().__init__(Told, patient=patient)
        self._cluster = cluster
        self._tenant = tenant
        self._user = user
        self._notification = notification
        self._stored = stored
        self._done = done
        self._holders: dict[str, int] = {}
        self._known = True

    def routed(self, answer: list[Any]) -> None:
        """The script said who was reached."""
        for place in range(1, len(answer), 3):
            if answer[place + 2]:
                self._holders[answer[place].decode()] = int(answer[place + 1])
        self._cluster.reached(self, len(self._holders))

    def unroutable(self) -> None:
        """Redis is away."""
        self._known = False
        self._cluster.bus.reached(self, 0)

    def finish(self) -> None:
        """Tell what is known by now."""
        known = self._known and self.expected is not None
        self._done(_of_user(self, self._holders) if known else UNKNOWN)
        if not self._stored and self._holders and not self.complete:
            self.after = self._give_back

    def _give_back(self, awaited: Awaited) -> None:
        there = _of_user(self, self._holders)
        if not there.delivered and not there.filtered:
            self._cluster.give_back(self._tenant, self._user, self._notification)


_NOTHING = encode_value(None)
_NUL = "\0"
_decode_waiting = msgspec.msgpack.Decoder(list[tuple[str, str, list[str]]]).decode
_decode_question = msgspec.msgpack.Decoder(tuple[str, list[tuple[str, str, list[str]]]]).decode


def _of_user(
    awaited: Awaited,
    holders: dict[str, int],
    user: str = "",
    sent: dict[str, dict[str, int]] | None = None,
) -> Elsewhere:
    """What the nodes that hold a user say; those that are silent have it by what is known."""
    if not holders:
        return NOWHERE
    delivered = routed = 0
    filtered = queued = False
    for node, connections in holders.items():
        told: Told | None = awaited.answers.get(node)
        place = 0 if sent is None else sent[node][user]
        if told is None or place >= len(told.users):
            routed += connections
            continue
        outcome, count = told.users[place]
        delivered += count if outcome == "delivered" else 0
        filtered = filtered or outcome == "filtered"
        queued = queued or outcome == "queued"
    return Elsewhere(delivered, routed, filtered, queued, len(holders))


def _of_users(
    awaited: Awaited, holders: dict[str, dict[str, int]], sent: dict[str, dict[str, int]]
) -> dict[str, Elsewhere]:
    return {user: _of_user(awaited, nodes, user, sent) for user, nodes in holders.items()}


def _failed(failed: Callable[[], None], call: asyncio.Future[None]) -> None:
    if call.cancelled() or call.exception() is not None:
        failed()


def _pass(answer: object) -> None:
    """What nobody waits for."""


def _pass_nothing() -> None:
    """Who is not told now finds it in Redis, or holds it a while longer."""
