"""The description of the API, against the API."""

from __future__ import annotations

import re
from typing import Any

from tests.unit.api_server import ApiServer


def references(node: Any) -> set[str]:
    """Every schema that a part of the document refers to."""
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(references(value) for value in node))
    return set()


async def described(server: ApiServer) -> dict[str, Any]:
    response = await server.request("GET", "/openapi.json", key=None)
    assert response.headers["Content-Type"] == "application/json"
    document: dict[str, Any] = response.json()
    return document


async def test_every_endpoint_is_described_and_nothing_else() -> None:
    server = ApiServer()
    document = await described(server)
    assert document["openapi"] == "3.1.0"
    operations = {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }
    assert operations == {(endpoint.method, endpoint.path) for endpoint in server.endpoints}
    ids = [
        operation["operationId"]
        for item in document["paths"].values()
        for operation in item.values()
    ]
    assert len(ids) == len(set(ids))


async def test_every_reference_leads_somewhere() -> None:
    document = await described(ApiServer())
    schemas = document["components"]["schemas"]
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas


async def test_operations_say_what_they_need_and_what_they_answer() -> None:
    document = await described(ApiServer())
    schemes = document["components"]["securitySchemes"]
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["summary"]
            assert [
                each["name"] for each in operation.get("parameters", []) if each["in"] == "path"
            ] == (re.findall(r"{(\w+)}", path))
            for requirement in operation["security"]:
                assert requirement.keys() <= schemes.keys()
            assert any(status.startswith("2") for status in operation["responses"])
    send = document["paths"]["/api/v1/notifications/send"]["post"]
    assert send["requestBody"]["required"] is True
    assert {"400", "401", "403", "413", "422", "503"} <= send["responses"].keys()
    assert document["paths"]["/api/v1/acks"]["post"]["security"] == [{"userToken": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    disconnect = document["paths"]["/api/v1/users/{id}/disconnect"]["post"]
    assert disconnect["requestBody"]["required"] is False


async def test_the_schemas_are_those_that_decode_and_encode() -> None:
    schemas = (await described(ApiServer()))["components"]["schemas"]
    body = schemas["SendBody"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["target_user_id"]
    assert body["properties"]["ttl"]["anyOf"][0]["maximum"] == 31_536_000
    priority = body["properties"]["priority"]["anyOf"][0]
    assert priority["enum"] == ["Low", "Normal", "High", "Critical"]
    assert set(schemas["ChannelAnswer"]["required"]) >= {"success", "outcome", "channel"}
    assert schemas["ErrorAnswer"]["required"] == ["error"]
