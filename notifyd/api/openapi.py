"""The HTTP API as OpenAPI 3.1, from the types that decode its requests and encode its answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any

import msgspec

from notifyd.api.guard import Access, Answer, Description, Endpoint, ErrorAnswer, Guard
from notifyd.version import __version__

_SECURITY: dict[Access, list[dict[str, list[str]]]] = {
    "read": [{"apiKey": []}, {"apiKeyAsBearer": []}],
    "publish": [{"apiKey": []}, {"apiKeyAsBearer": []}],
    "admin": [{"apiKey": []}, {"apiKeyAsBearer": []}],
    "user": [{"userToken": []}],
    "open": [],
}

_SECURITY_SCHEMES = {
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "apiKeyAsBearer": {"type": "http", "scheme": "bearer", "description": "The API key."},
    "userToken": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "The user's own token.",
    },
}

_RATE_HEADERS = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")

_WHO: dict[Access, str] = {
    "read": "Needs an API key with the scope `read`.",
    "publish": "Needs an API key with the scope `publish`.",
    "admin": "Needs an API key with the scope `admin`.",
    "user": "Needs the user's token.",
    "open": "Open to anybody.",
}

_OF_KEYS: frozenset[Access] = frozenset({"read", "publish", "admin"})


def openapi_endpoint(guard: Guard, endpoints: Sequence[Endpoint]) -> Endpoint:
    """GET /openapi.json, which describes `endpoints` and itself."""
    description = Description("This description", "Operations", content_type="application/json")

    @cache  # made when somebody asks: it took most of the time in which a server was built
    def answer() -> Answer:
        return Answer(200, msgspec.json.encode(document([*endpoints, endpoint])))

    endpoint = Endpoint(
        guard, "GET", "/openapi.json", lambda request: answer(), description, access="open"
    )
    return endpoint


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The whole description, as JSON's types."""
    endpoints = list(endpoints)
    types: list[Any] = [ErrorAnswer]
    for endpoint in endpoints:
        for type in (endpoint.description.body, endpoint.description.answer):
            if type is not None and type not in types:
                types.append(type)
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, schema_of)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "notifyd",
            "version": __version__,
            "description": "Real-time notifications over WebSocket and Server-Sent Events.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": _SECURITY_SCHEMES},
    }


def _operation(endpoint: Endpoint, schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    description = endpoint.description
    operation: dict[str, Any] = {
        "operationId": _operation_id(endpoint),
        "summary": description.summary,
        "description": _WHO[endpoint.access],
        "tags": [description.tag],
        "security": _SECURITY[endpoint.access],
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]
    if endpoint.access in _OF_KEYS:
        parameters.append(
            {
                "name": "X-Tenant-ID",
                "in": "header",
                "required": False,
                "description": (
                    "With tenants, the one that the call is for"
                    + (
                        ", if any."
                        if endpoint.operating
                        else ". Needed where the key is bound to none."
                    )
                ),
                "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
            }
        )
    if endpoint.idempotent:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "maxLength": 256},
            }
        )
    if parameters:
        operation["parameters"] = parameters
    if description.body is not None:
        operation["requestBody"] = {
            # The only bodies that may be left out say nothing that has no default.
            "required": bool(_required(description.body)),
            "content": {"application/json": {"schema": schema_of[description.body]}},
        }
    operation["responses"] = _responses(endpoint, schema_of)
    return operation


def _required(type: Any) -> list[str]:
    return [field.name for field in msgspec.structs.fields(type) if field.required] or (
        ["event_type"] if "event_type" in type.__struct_fields__ else []
    )


def _responses(endpoint: Endpoint, schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    description = endpoint.description
    success: dict[str, Any] = {"description": HTTPStatus(endpoint.status).phrase}
    if endpoint.status != 204:
        schema = {} if description.answer is None else schema_of[description.answer]
        success["content"] = {description.content_type: {"schema": schema}}
    success["headers"] = {"X-Request-ID": {"schema": {"type": "string"}}}
    if endpoint.limited:
        success["headers"] |= {name: {"schema": {"type": "integer"}} for name in _RATE_HEADERS}
    responses = {str(endpoint.status): success}
    for status in sorted(_error_statuses(endpoint)):
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": schema_of[ErrorAnswer]}},
        }
    return responses


def _error_statuses(endpoint: Endpoint) -> set[int]:
    statuses = {500, *endpoint.description.errors}
    if endpoint.access != "open":
        statuses |= {400, 401, 403}
    if endpoint.description.body is not None:
        statuses |= {400, 408, 413, 422}
    elif "{" in endpoint.path:
        statuses |= {400, 422}
    if endpoint.idempotent or endpoint.limited:
        statuses.add(429)
    return statuses


def _operation_id(endpoint: Endpoint) -> str:
    words = re.findall(r"[a-z0-9]+", endpoint.path.removeprefix("/api/"))
    return "_".join([endpoint.method.lower(), *words])
