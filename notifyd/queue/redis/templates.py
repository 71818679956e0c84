"""Templates in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from notifyd.errors import Conflict, NotFound, ValidationError
from notifyd.notification import Priority
from notifyd.queue.corrupt import CorruptLog
from notifyd.queue.redis.scripts import load_script
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis
from notifyd.templates import MAX_TEMPLATES, Template


class _StoredTemplate(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    v: int
    id: str
    name: str
    event: str
    payload: msgspec.Raw
    updated: float
    priority: Priority = Priority.NORMAL
    ttl: int | None = None


TEMPLATE_VERSION = 1

_encode_template = msgspec.json.Encoder().encode
_decode_template = msgspec.json.Decoder(_StoredTemplate).decode


class RedisTemplates:
    """`TemplateStore` in Redis, one hash for a tenant. They are configuration: the one thing here
    without an expiry."""

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        *,
        on_corrupt: Callable[[str], None],
        max_per_tenant: int = MAX_TEMPLATES,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._corrupt = CorruptLog(on_corrupt)
        self._max_per_tenant = max_per_tenant
        self._change = load_script("template")

    def get(self, tenant: str, id: str) -> Awaitable[Template]:
        """Raises NotFound."""
        key = self._keys.templates(tenant)

        def found(answer: list[bytes | None]) -> Template:
            body, created = answer
            template = None if body is None else self._decoded(id, body, created)
            if template is None:
                raise NotFound("There is no template with this id.")
            return template

        return self._redis.command("HMGET", key, f"t{id}", f"c{id}", convert=found)

    def list(self, tenant: str) -> Awaitable[Sequence[Template]]:
        """All of a tenant's templates, by id; without those that cannot be read."""

        def found(answer: list[bytes]) -> Sequence[Template]:
            fields = dict(zip(answer[::2], answer[1::2], strict=True))
            templates = [
                self._decoded(name[1:].decode(), body, fields.get(b"c" + name[1:]))
                for name, body in fields.items()
                if name.startswith(b"t")
            ]
            present = [each for each in templates if each is not None]
            return sorted(present, key=lambda template: template.id)

        return self._redis.command("HGETALL", self._keys.templates(tenant), convert=found)

    def _decoded(self, id: str, body: bytes, created: bytes | None) -> Template | None:
        try:
            stored = _decode_template(body)
            if stored.v != TEMPLATE_VERSION or stored.id != id:
                raise ValueError("another version, or another template")
            template = Template(
                id,
                stored.name,
                stored.event,
                stored.payload,
                stored.priority,
                stored.ttl,
                float(created or stored.updated),
                stored.updated,
            )
            template.parts  # noqa: B018  # compiled now, so that one that cannot be is found here
        except (msgspec.MsgspecError, ValueError, ValidationError) as error:
            self._corrupt.tell("a template cannot be read", "template", error)
            return None
        return template

    def create(self, tenant: str, template: Template) -> Awaitable[Template]:
        """Raises Conflict for an id that is taken, or when the tenant has as many as it may."""

        def created(answer: bytes) -> Template:
            if answer == b"taken":
                raise Conflict(f"There is a template '{template.id}' already.", field="id")
            if answer == b"full":
                raise Conflict(f"There are {self._max_per_tenant} templates already, the maximum.")
            return template

        return self._put("create", tenant, template, created)

    def replace(self, tenant: str, template: Template) -> Awaitable[Template]:
        """Put `template` in place of its namesake, whose `created_at` stays; raises NotFound."""

        def replaced(answer: bytes) -> Template:
            if answer == b"missing":
                raise NotFound("There is no template with this id.")
            return msgspec.structs.replace(template, created_at=float(answer))

        return self._put("replace", tenant, template, replaced)

    def _put(
        self,
        what: str,
        tenant: str,
        template: Template,
        convert: Callable[[bytes], Template],
    ) -> asyncio.Future[Template]:
        body = _encode_template(
            _StoredTemplate(
                TEMPLATE_VERSION,
                template.id,
                template.name,
                template.event_type,
                template.payload_template,
                template.updated_at,
                template.priority,
                template.ttl,
            )
        )
        args = (what, template.id, body, repr(template.created_at), self._max_per_tenant)
        return self._redis.run(self._change, (self._keys.templates(tenant),), args, convert)

    def delete(self, tenant: str, id: str) -> Awaitable[None]:
        """Raises NotFound."""

        def deleted(answer: bytes) -> None:
            if answer == b"missing":
                raise NotFound("There is no template with this id.")

        return self._redis.run(
            self._change, (self._keys.templates(tenant),), ("delete", id), deleted
        )
