"""What callers send -> notifications and targets, whichever way it came in."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeVar, get_args

import msgspec
from msgspec import Meta, Raw

from notifyd.errors import ValidationError
from notifyd.eventually import Eventually, then
from notifyd.identifiers import canonical_uuid
from notifyd.names import channel_name, user_id
from notifyd.notification import (
    EVERYONE,
    Audience,
    AudienceType,
    Notification,
    Priority,
    Target,
    TargetType,
)
from notifyd.templates import Template, TemplateStore, render
from notifyd.wire import normalise_payload

T = TypeVar("T")

MAX_USERS = 10_000
MAX_USERS_BYTES = 4_194_304
"""Of what is sent to `users`, in a request or in a message."""

MAX_CHANNELS = 100
MAX_TTL = 31_536_000
DEFAULT_SOURCE = "http-api"

MISSING = Raw()
"""What `payload` and `variables` are where they were left out."""


def _missing() -> Raw:
    return MISSING


PriorityName = Annotated[
    str,
    Meta(
        description="In any case.",
        extra_json_schema={"enum": [priority.value for priority in Priority]},
    ),
]
EventType = Annotated[str, Meta(min_length=1, max_length=128, examples=["order.created"])]
Ttl = Annotated[
    int,
    Meta(
        ge=0,
        le=MAX_TTL,
        description="Seconds; 0: only who is connected now, and never stored.",
        examples=[3600],
    ),
]
# With these two at their longest, what goes with a payload stays within a few kilobytes.
ShortText = Annotated[str, Meta(max_length=512)]


class AudienceBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Narrows who receives: roles, user ids or channels, never told to recipients."""

    type: Annotated[
        str,
        Meta(
            description="In any case.",
            extra_json_schema={"enum": ["All", "Roles", "Users", "Channels"]},
        ),
    ]
    value: Annotated[list[str], Meta(max_length=MAX_USERS)] | None = None


class Content(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """What is sent: either `event_type` and `payload`, or `template_id` and `variables`."""

    event_type: EventType | None = None
    payload: Annotated[
        Raw, Meta(description="Any JSON, nested at most 64 deep.", examples=[{"order_id": "A-1"}])
    ] = msgspec.field(default_factory=_missing)
    template_id: str | None = None
    variables: Annotated[
        Raw,
        Meta(
            description="An object with what the template's placeholders stand for.",
            extra_json_schema={"type": "object"},
        ),
    ] = msgspec.field(default_factory=_missing)
    priority: PriorityName | None = None
    ttl: Ttl | None = None
    correlation_id: ShortText | None = None
    source: ShortText | None = None
    audience: AudienceBody | None = None
    idempotency_key: (
        Annotated[str, Meta(description="As the header Idempotency-Key; 1 to 256 bytes.")] | None
    ) = None
    id: (
        Annotated[
            str,
            Meta(
                description="The notification's id, chosen by the caller; repeated, it acts as an "
                "idempotency key.",
                extra_json_schema={"format": "uuid"},
            ),
        ]
        | None
    ) = None
    exclude_connection: (
        Annotated[
            str,
            Meta(
                description="The id of a connection that does not get it: the sender's own.",
                extra_json_schema={"format": "uuid"},
            ),
        ]
        | None
    ) = None
    require_ack: Annotated[
        bool,
        Meta(description="Each recipient of a channel or broadcast is expected to ack."),
    ] = False


def excluded(content: Content) -> str | None:
    """The id of the connection that does not get it, None where all may. Raises ValidationError."""
    id = content.exclude_connection
    return None if id is None else canonical_uuid(id, "exclude_connection")


class TargetBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Whom it is for: a `user`, `users`, a `channel`, `channels`, or everybody (`broadcast`)."""

    type: Annotated[
        str,
        Meta(
            description="In any case.",
            extra_json_schema={"enum": ["user", "users", "broadcast", "channel", "channels"]},
        ),
    ]
    value: Annotated[
        str | Annotated[list[str], Meta(max_length=MAX_USERS)] | None,
        Meta(description="A name; a list of them for users and channels; nothing for a broadcast."),
    ] = None


class NotificationBody(Content, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One notification to a target of any type: an item of a batch, or a call of its own."""

    target: TargetBody


class Composer:
    """Makes notifications of what callers send, whichever way it came in.

    `source` is what a notification says that does not name its own; `clock` gives Unix seconds,
    `new_id` a UUID's text.
    """

    __slots__ = ("_clock", "_new_id", "_source", "_templates")

    def __init__(
        self,
        templates: TemplateStore,
        *,
        source: str = DEFAULT_SOURCE,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._templates = templates
        self._source = source
        self._clock = clock
        self._new_id = new_id

    def __call__(
        self, tenant: str, content: Content, entry: str | None = None, at: float | None = None
    ) -> Eventually[Notification]:
        """The notification, whole and checked; raises ValidationError and NotFound.

        `entry` is that of a stream, and its id where the content has none, `at` when it occurred
        (Unix seconds); else a new one, and now.
        """
        if content.template_id is None:
            event_type = content.event_type
            if event_type is None or content.payload is MISSING or content.variables is not MISSING:
                raise _incomplete(content)
            payload = normalise_payload(content.payload)
            return self._notification(
                content, event_type, payload, Priority.NORMAL, None, entry, at
            )
        if content.event_type is not None or content.payload is not MISSING:
            raise _incomplete(content)
        return then(
            self._templates.get(tenant, content.template_id),
            lambda template: self._filled_in(content, template, entry, at),
        )

    def _filled_in(
        self, content: Content, template: Template, entry: str | None, at: float | None
    ) -> Notification:
        variables = b"{}" if content.variables is MISSING else bytes(content.variables)
        payload = render(template, variables)
        return self._notification(
            content, template.event_type, payload, template.priority, template.ttl, entry, at
        )

    def _notification(
        self,
        content: Content,
        event_type: str,
        payload: Raw,
        priority: Priority,
        ttl: int | None,
        entry: str | None,
        at: float | None,
    ) -> Notification:
        """What the caller says counts before what his template says."""
        return Notification(
            canonical_uuid(content.id) if content.id is not None else entry or self._new_id(),
            self._clock() if at is None else at,
            event_type,
            payload,
            priority if content.priority is None else priority_named(content.priority),
            ttl if content.ttl is None else content.ttl,
            content.correlation_id,
            self._source if content.source is None else content.source,
            EVERYONE if content.audience is None else _audience(content.audience),
            content.require_ack,
            entry,
        )


def _cases(name: str) -> tuple[str, str]:
    """As it is written, and as a name in any other case is looked up."""
    return name, name.lower()


_PRIORITIES = {name: priority for priority in Priority for name in _cases(priority.value)}
_AUDIENCES: dict[str, AudienceType] = {
    name: type for type in get_args(AudienceType) for name in _cases(type)
}
_TARGET_TYPES: dict[str, TargetType] = {
    name: type for type in get_args(TargetType) for name in _cases(type)
}
BROADCAST = Target("broadcast")


def priority_named(name: str) -> Priority:
    """The priority of that name, in any case; raises ValidationError."""
    return _choice(name, _PRIORITIES, "priority")


def _choice(name: str, choices: Mapping[str, T], field: str) -> T:
    found = choices.get(name) or choices.get(name.lower())
    if found is None:
        names = list(dict.fromkeys(choices.values()))
        constraint = "one of " + ", ".join(
            name.value if isinstance(name, enum.Enum) else str(name) for name in names
        )
        raise ValidationError(f"{field} must be {constraint}.", field=field, constraint=constraint)
    return found


def checked_names(
    names: Sequence[str], check: Callable[[str, str], str], field: str
) -> tuple[str, ...]:
    """Names without repetition, each checked; raises ValidationError naming the first bad one."""
    try:
        return tuple({check(name, field): None for name in names})
    except ValidationError:
        for index, name in enumerate(names):
            check(name, f"{field}[{index}]")
        raise


def target_in(body: TargetBody) -> Target:
    return target_of(body.type, body.value, "target.type", "target.value")


def target_of(type_name: str, value: str | list[str] | None, type_field: str, field: str) -> Target:
    """The target of a type, in any case, and a name or names; raises ValidationError for the
    fields.
    """
    type = _choice(type_name, _TARGET_TYPES, type_field)
    match type:
        case "user":
            if isinstance(value, str):
                return Target(type, (user_id(value, field),))
            raise _target_value(field, "a user id")
        case "channel":
            if isinstance(value, str):
                return Target(type, (channel_name(value, field),))
            raise _target_value(field, "a channel name")
        case "broadcast":
            if value is None:
                return BROADCAST
            raise _target_value(field, "left out for a broadcast")
        case "users":
            if isinstance(value, list) and 1 <= len(value) <= MAX_USERS:
                return Target(type, checked_names(value, user_id, field))
            raise _target_value(field, f"a list of 1 to {MAX_USERS} user ids")
        case _:
            if isinstance(value, list) and 1 <= len(value) <= MAX_CHANNELS:
                return Target(type, checked_names(value, channel_name, field))
            raise _target_value(field, f"a list of 1 to {MAX_CHANNELS} channel names")


def _target_value(field: str, constraint: str) -> ValidationError:
    return ValidationError(f"{field} must be {constraint}.", field=field, constraint=constraint)


def _audience(body: AudienceBody) -> Audience:
    type = _choice(body.type, _AUDIENCES, "audience.type")
    if type == "All":
        if body.value:
            raise _audience_value("left out for the type All")
        return EVERYONE
    if body.value is None:
        raise _audience_value(f"a list of {type.lower()}")
    if type == "Users":
        return Audience(type, frozenset(checked_names(body.value, user_id, "audience.value")))
    if type == "Channels":
        return Audience(type, frozenset(checked_names(body.value, channel_name, "audience.value")))
    return Audience(type, frozenset(body.value))


def _audience_value(constraint: str) -> ValidationError:
    return ValidationError(
        f"audience.value must be {constraint}.", field="audience.value", constraint=constraint
    )


def _incomplete(content: Content) -> ValidationError:
    """Why the content is neither an event nor a template."""
    if content.template_id is not None:
        field = "event_type" if content.event_type is not None else "payload"
        message = f"{field} and template_id exclude each other: a template makes both."
    elif content.event_type is None:
        field = "event_type"
        message = "Either event_type with payload, or template_id with variables, is needed."
    elif content.payload is MISSING:
        field = "payload"
        message = "payload is missing; any JSON will do, {} too."
    else:
        field = "variables"
        message = "variables fill a template; template_id is missing."
    constraint = "either event_type and payload, or template_id and variables"
    return ValidationError(message, field=field, constraint=constraint)
