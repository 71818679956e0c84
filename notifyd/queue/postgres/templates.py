"""Templates in PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from notifyd.errors import Conflict, NotFound
from notifyd.notification import Priority
from notifyd.postgres import Connection, Postgres
from notifyd.queue.corrupt import CorruptLog
from notifyd.queue.postgres.calls import QUERIES
from notifyd.templates import MAX_TEMPLATES, Template


class _StoredTemplate(msgspec.Struct, gc=False, omit_defaults=True):
    v: int
    id: str
    name: str
    event_type: str
    payload: msgspec.Raw
    updated_at: float
    priority: Priority = Priority.NORMAL
    ttl: int | None = None


_TEMPLATE_VERSION = 1
_decode_template = msgspec.json.Decoder(_StoredTemplate).decode


def _encode_template(template: Template) -> bytes:
    return msgspec.json.encode(
        _StoredTemplate(
            _TEMPLATE_VERSION,
            template.id,
            template.name,
            template.event_type,
            template.payload_template,
            template.updated_at,
            template.priority,
            template.ttl,
        )
    )


class PostgresTemplates:
    """`TemplateStore` in PostgreSQL. One that cannot be read is told to `on_corrupt(reason)`, and
    is as if it were not there."""

    def __init__(
        self,
        postgres: Postgres,
        *,
        on_corrupt: Callable[[str], None],
        max_per_tenant: int = MAX_TEMPLATES,
    ) -> None:
        self._postgres = postgres
        self._corrupt = CorruptLog(on_corrupt)
        self._max_per_tenant = max_per_tenant

    async def get(self, tenant: str, id: str) -> Template:
        """Raises NotFound, Unavailable."""

        async def work(connection: Connection) -> Any:
            return await connection.fetchrow(QUERIES["get_template"], tenant, id)

        row = await self._postgres.transaction(work)
        template = None if row is None else self._template(row)
        if template is None:
            raise NotFound("There is no template with this id.")
        return template

    async def list(self, tenant: str) -> Sequence[Template]:
        """All of a tenant's templates, by id. Raises Unavailable."""

        async def work(connection: Connection) -> Sequence[Any]:
            rows: Sequence[Any] = await connection.fetch(QUERIES["list_templates"], tenant)
            return rows

        rows = await self._postgres.transaction(work)
        return [template for row in rows if (template := self._template(row)) is not None]

    async def create(self, tenant: str, template: Template) -> Template:
        """Raises Conflict for an id that is taken, or when the tenant has as many as it may;
        Unavailable."""
        body = _encode_template(template)

        async def work(connection: Connection) -> Any:
            await connection.execute(QUERIES["lock_templates"], tenant)
            return await connection.fetchrow(
                QUERIES["create_template"],
                tenant,
                template.id,
                template.created_at,
                body,
                self._max_per_tenant,
            )

        row = await self._postgres.transaction(work)
        if row["taken"]:
            raise Conflict(f"There is a template '{template.id}' already.", field="id")
        if row["full"]:
            raise Conflict(f"There are {self._max_per_tenant} templates already, the maximum.")
        return template

    async def replace(self, tenant: str, template: Template) -> Template:
        """Put `template` in place of its namesake, whose `created_at` stays; raises NotFound,
        Unavailable."""
        body = _encode_template(template)

        async def work(connection: Connection) -> float | None:
            created_at: float | None = await connection.fetchval(
                QUERIES["replace_template"], tenant, template.id, body
            )
            return created_at

        created_at = await self._postgres.transaction(work)
        if created_at is None:
            raise NotFound("There is no template with this id.")
        return msgspec.structs.replace(template, created_at=created_at)

    async def delete(self, tenant: str, id: str) -> None:
        """Raises NotFound, Unavailable."""

        async def work(connection: Connection) -> str | None:
            deleted: str | None = await connection.fetchval(QUERIES["delete_template"], tenant, id)
            return deleted

        if await self._postgres.transaction(work) is None:
            raise NotFound("There is no template with this id.")

    def _template(self, row: Any) -> Template | None:
        try:
            stored = _decode_template(row["body"])
        except msgspec.MsgspecError as error:
            self._corrupt.tell("a template cannot be read", "shape", error)
            return None
        if stored.v != _TEMPLATE_VERSION:
            self._corrupt.tell(
                "a template cannot be read",
                "version",
                f"version {stored.v} and not {_TEMPLATE_VERSION}",
            )
            return None
        return Template(
            stored.id,
            stored.name,
            stored.event_type,
            stored.payload,
            stored.priority,
            stored.ttl,
            row["created_at"],
            stored.updated_at,
        )
