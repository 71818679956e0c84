"""What `TemplateStore` promises, whatever keeps it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from notifyd.errors import Conflict, NotFound
from notifyd.eventually import settled
from notifyd.notification import Priority
from notifyd.templates import Template, new_template, render
from tests.contract.backends import NOW, Backend


def a_template(id: str = "welcome", **fields: Any) -> Template:
    given: dict[str, Any] = {
        "name": "Welcome",
        "event_type": "user.joined",
        "payload_template": msgspec.Raw('{"text":"Hällo {{name}}","n":1.50}'.encode()),
        "priority": Priority.HIGH,
        "ttl": 60,
        "now": NOW,
        **fields,
    }
    return new_template(id=id, **given)


class TestStore:
    async def test_gives_back_what_it_was_given(self, backend: Backend) -> None:
        store = await backend.templates()
        template = a_template()
        assert await settled(store.create("acme", template)) == template
        kept = await settled(store.get("acme", "welcome"))
        assert kept == template
        assert bytes(render(kept, b'{"name":"Ann"}')) == '{"text":"Hällo Ann","n":1.50}'.encode()

    async def test_lists_a_tenants_by_id(self, backend: Backend) -> None:
        store = await backend.templates()
        for id in ("c", "a", "b"):
            await settled(store.create("acme", a_template(id)))
        await settled(store.create("globex", a_template("d")))
        assert [each.id for each in await settled(store.list("acme"))] == ["a", "b", "c"]
        assert list(await settled(store.list("nobody"))) == []

    async def test_a_taken_id_is_a_conflict_within_its_tenant(self, backend: Backend) -> None:
        store = await backend.templates()
        await settled(store.create("acme", a_template()))
        with pytest.raises(Conflict):
            await settled(store.create("acme", a_template(name="Another")))
        assert (await settled(store.get("acme", "welcome"))).name == "Welcome"
        await settled(store.create("globex", a_template()))

    async def test_replacing_keeps_when_it_was_created(self, backend: Backend) -> None:
        store = await backend.templates()
        await settled(store.create("acme", a_template()))
        newer = a_template(name="Newer", now=NOW + 10)
        replaced = await settled(store.replace("acme", newer))
        assert (replaced.name, replaced.created_at, replaced.updated_at) == (
            "Newer",
            NOW,
            NOW + 10,
        )
        assert await settled(store.get("acme", "welcome")) == replaced

    async def test_what_is_deleted_is_gone(self, backend: Backend) -> None:
        store = await backend.templates()
        await settled(store.create("acme", a_template()))
        await settled(store.delete("acme", "welcome"))
        with pytest.raises(NotFound):
            await settled(store.get("acme", "welcome"))
        await settled(store.create("acme", a_template()))

    async def test_what_is_not_there_is_not_found(self, backend: Backend) -> None:
        store = await backend.templates()
        await settled(store.create("globex", a_template()))
        with pytest.raises(NotFound):
            await settled(store.get("acme", "welcome"))
        with pytest.raises(NotFound):
            await settled(store.replace("acme", a_template()))
        with pytest.raises(NotFound):
            await settled(store.delete("acme", "welcome"))

    async def test_is_bounded_per_tenant(self, backend: Backend) -> None:
        store = await backend.templates(max_per_tenant=2)
        for id in ("a", "b"):
            await settled(store.create("acme", a_template(id)))
        with pytest.raises(Conflict):
            await settled(store.create("acme", a_template("c")))
        await settled(store.create("globex", a_template("c")))
        await settled(store.delete("acme", "a"))
        await settled(store.create("acme", a_template("c")))
