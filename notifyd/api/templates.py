"""Templates: made, changed and removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from notifyd.api.channels import Time
from notifyd.api.guard import Description, Endpoint, Guard, Request
from notifyd.compose import EventType, PriorityName, Ttl, priority_named
from notifyd.decoding import Decoder
from notifyd.errors import ValidationError
from notifyd.eventually import Eventually, then
from notifyd.identifiers import timestamp_text
from notifyd.notification import Priority
from notifyd.templates import Template, TemplateStore, new_template

Text = Annotated[str, Meta(min_length=1, max_length=128)]
PayloadTemplate = Annotated[
    Raw,
    Meta(
        description="Any JSON; in its strings, {{name}} and {{a.b}} stand for variables.",
        examples=[{"text": "Order {{order_id}} is on its way"}],
    ),
]


class TemplateReplacement(
    msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True
):
    """A template for an id that is taken; `id`, if given, is that of the path."""

    id: str | None = None
    name: Text
    event_type: EventType
    payload_template: PayloadTemplate
    priority: PriorityName | None = None
    ttl: Ttl | None = None


class TemplateBody(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """A new template, with the priority and ttl of its notifications unless they say otherwise."""

    id: Annotated[
        str,
        Meta(
            description="1 to 64 of letters, digits, - _ . and, inside, :",
            examples=["order-shipped"],
        ),
    ]
    name: Text
    event_type: EventType
    payload_template: PayloadTemplate
    priority: PriorityName | None = None
    ttl: Ttl | None = None


class TemplateAnswer(msgspec.Struct, gc=False):
    """A template as it is kept."""

    id: str
    name: str
    event_type: str
    payload_template: Raw
    priority: Priority
    ttl: int | None
    created_at: Time
    updated_at: Time


class TemplatesList(msgspec.Struct, gc=False):
    """All templates, by id."""

    templates: list[TemplateAnswer]
    total: int


class Templates:
    """The handlers of /api/v1/templates. `clock` gives Unix seconds."""

    def __init__(
        self, guard: Guard, templates: TemplateStore, *, clock: Callable[[], float]
    ) -> None:
        self._guard = guard
        self._templates = templates
        self._clock = clock
        self._body = Decoder(TemplateBody)
        self._replacement = Decoder(TemplateReplacement)

    def endpoints(self) -> list[Endpoint]:
        """Create, list, look up, replace, delete."""
        one, several = "/api/v1/templates/{id}", "/api/v1/templates"
        tag = "Templates"
        return [
            Endpoint(
                self._guard,
                "POST",
                several,
                self.create,
                Description("Create a template", tag, TemplateBody, TemplateAnswer, (409,)),
                access="admin",
                status=201,
            ),
            Endpoint(
                self._guard,
                "GET",
                several,
                self.all,
                Description("List templates", tag, answer=TemplatesList),
                access="read",
            ),
            Endpoint(
                self._guard,
                "GET",
                one,
                self.one,
                Description("Look up a template", tag, answer=TemplateAnswer, errors=(404,)),
                access="read",
            ),
            Endpoint(
                self._guard,
                "PUT",
                one,
                self.replace,
                Description("Replace a template", tag, TemplateReplacement, TemplateAnswer, (404,)),
                access="admin",
            ),
            Endpoint(
                self._guard,
                "DELETE",
                one,
                self.delete,
                Description("Delete a template", tag, errors=(404,)),
                access="admin",
                status=204,
            ),
        ]

    def create(self, request: Request) -> Eventually[TemplateAnswer]:
        """POST /api/v1/templates."""
        body = self._body(request.body)
        template = self._template(body.id, body)
        created = self._templates.create(request.tenant, template)
        return then(created, _answer)

    def all(self, request: Request) -> Eventually[TemplatesList]:
        """GET /api/v1/templates."""

        def answer(templates: Sequence[Template]) -> TemplatesList:
            return TemplatesList([_answer(template) for template in templates], len(templates))

        return then(self._templates.list(request.tenant), answer)

    def one(self, request: Request) -> Eventually[TemplateAnswer]:
        """GET /api/v1/templates/{id}."""
        return then(self._templates.get(request.tenant, request.path_params["id"]), _answer)

    def replace(self, request: Request) -> Eventually[TemplateAnswer]:
        """PUT /api/v1/templates/{id}."""
        id = request.path_params["id"]
        body = self._replacement(request.body)
        if body.id is not None and body.id != id:
            raise ValidationError(
                "id is another one than the path's; a template keeps its id.",
                field="id",
                constraint="the id of the path, or left out",
            )
        return then(self._templates.replace(request.tenant, self._template(id, body)), _answer)

    def delete(self, request: Request) -> Eventually[None]:
        """DELETE /api/v1/templates/{id}."""
        return self._templates.delete(request.tenant, request.path_params["id"])

    def _template(self, id: str, body: TemplateBody | TemplateReplacement) -> Template:
        priority = Priority.NORMAL if body.priority is None else priority_named(body.priority)
        return new_template(
            id=id,
            name=body.name,
            event_type=body.event_type,
            payload_template=body.payload_template,
            priority=priority,
            ttl=body.ttl,
            now=self._clock(),
        )


def _answer(template: Template) -> TemplateAnswer:
    return TemplateAnswer(
        template.id,
        template.name,
        template.event_type,
        template.payload_template,
        template.priority,
        template.ttl,
        timestamp_text(template.created_at),
        timestamp_text(template.updated_at),
    )
