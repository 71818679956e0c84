from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notifyd.errors import Conflict, NotFound, Unavailable, ValidationError
from notifyd.eventually import is_awaitable, settled
from notifyd.notification import Priority
from notifyd.templates import CachedTemplates, MemoryTemplates, Template, new_template, render


def template(payload: object, **fields: Any) -> Template:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return new_template(
        **{
            "id": "order-created",
            "name": "Order created",
            "event_type": "order.created",
            "payload_template": raw,
            "now": 1767268800.0,
            **fields,
        }
    )


def rendered(payload: object, variables: dict[str, Any]) -> Any:
    return msgspec.json.decode(render(template(payload), variables))


class TestNewTemplate:
    def test_keeps_what_it_was_given_and_normalises_the_payload(self) -> None:
        made = template(
            b'{"total": 1.10,\n "text": "{{a}}"}', priority=Priority.HIGH, ttl=3600, id="a.b:c-_"
        )
        assert made.answer() == {
            "id": "a.b:c-_",
            "name": "Order created",
            "event_type": "order.created",
            "payload_template": msgspec.Raw(b'{"total":1.10,"text":"{{a}}"}'),
            "priority": "High",
            "ttl": 3600,
            "created_at": "2026-01-01T12:00:00.000Z",
            "updated_at": "2026-01-01T12:00:00.000Z",
        }

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("id", ""),
            ("id", "x" * 65),
            ("id", "a b"),
            ("id", ":a"),
            ("id", "a:"),
            ("id", "a/b"),
            ("id", "a\n"),
            ("id", "ä"),
            ("name", ""),
            ("name", "x" * 129),
            ("event_type", ""),
            ("event_type", "x" * 129),
            ("ttl", -1),
            ("ttl", 31_536_001),
            ("payload_template", b"{"),
            ("payload_template", b""),
            ("payload_template", b'{"a":"\\ud800"}'),
            ("payload_template", b'"' + b"x" * 65535 + b'"'),
            ("payload_template", b"[" * 65 + b"]" * 65),
            ("payload_template", b"[" * 30_000 + b"]" * 30_000),
            ("payload_template", b'"{{}}"'),
            ("payload_template", b'"{{ a b }}"'),
            ("payload_template", b'"{{a..b}}"'),
            ("payload_template", b'"{{.a}}"'),
            ("payload_template", json.dumps("{{" + ".".join("a" * 65) + "}}").encode()),
        ],
    )
    def test_refuses_and_names_the_field(self, field: str, value: object) -> None:
        with pytest.raises(ValidationError) as caught:
            template(**{"payload": {}, field: value})
        assert caught.value.field == field

    def test_takes_what_is_just_within(self) -> None:
        template(b'"' + b"x" * 65534 + b'"', id="x" * 64, ttl=0)
        template(b"[" * 64 + b"]" * 64, id="x", ttl=31_536_000)
        template(json.dumps("{{" + ".".join("a" * 64) + "}}").encode())

    def test_parts_are_compiled_once(self) -> None:
        made = template({"a": "{{b}}"})
        assert made.parts is made.parts


class TestRender:
    def test_fills_in_anywhere_but_in_keys(self) -> None:
        payload = {
            "title": "Order {{order_id}} of {{ customer.name }}",
            "{{order_id}}": ["{{order_id}}", {"deep": "-{{order_id}}-"}],
            "plain": "no { braces }, {{ none",
            "n": 1,
        }
        variables = {"order_id": 42, "customer": {"name": 'Zoë "Z"\n'}}
        assert rendered(payload, variables) == {
            "title": 'Order 42 of Zoë "Z"\n',
            "{{order_id}}": [42, {"deep": "-42-"}],
            "plain": "no { braces }, {{ none",
            "n": 1,
        }

    @pytest.mark.parametrize(
        ("value", "inside"),
        [
            ("text", "text"),
            ("", ""),
            (42, "42"),
            (-1.5, "-1.5"),
            (True, "true"),
            (None, "null"),
            ({"a": [1, "x"]}, '{"a":[1,"x"]}'),
            ([1, 2], "[1,2]"),
            ('"}],{{x}}\\', '"}],{{x}}\\'),
        ],
    )
    def test_alone_keeps_the_type_and_inside_becomes_text(self, value: object, inside: str) -> None:
        payload = {
            "alone": "{{v}}",
            "spaced": "{{ v }}",
            "inside": "<{{v}}>",
            "twice": "{{v}}{{v}}",
        }
        assert rendered(payload, {"v": value}) == {
            "alone": value,
            "spaced": value,
            "inside": f"<{inside}>",
            "twice": inside + inside,
        }

    def test_numbers_keep_their_digits(self) -> None:
        made = template(b'{"a":"{{v}}","b":"EUR {{v}}","c":2.50}')
        assert bytes(render(made, b' { "v" : 12.50 } ')) == b'{"a":12.50,"b":"EUR 12.50","c":2.50}'

    def test_escaped_braces_are_braces(self) -> None:
        assert rendered(b'"\\u007b{a}\\u007d"', {"a": 1}) == 1

    def test_three_braces_are_a_brace_and_a_placeholder(self) -> None:
        assert rendered("{{{a}}}", {"a": 1}) == "{1}"

    def test_without_placeholders_it_is_the_payload(self) -> None:
        made = template({"a": 1})
        assert render(made, {}) is made.payload_template

    def test_a_top_level_string_may_be_the_template(self) -> None:
        assert rendered("{{a}}", {"a": {"b": 1}}) == {"b": 1}

    def test_a_key_that_looks_like_a_string_value_is_no_trap(self) -> None:
        payload = {'a":"{{x}}': "{{x}}", "b\\": "{{x}}"}
        assert rendered(payload, {"x": 1}) == {'a":"{{x}}': 1, "b\\": 1}

    @pytest.mark.parametrize(
        ("name", "variables"),
        [
            ("order_id", {}),
            ("a.b", {"a": {}}),
            ("a.b", {"a": 5}),
            ("a.b", {"a": [1]}),
            ("a.b", {"a": '{"b":1}'}),
            ("a.b.c.d", {"a": {"b": None}}),
        ],
    )
    def test_a_missing_variable_is_named(self, name: str, variables: dict[str, Any]) -> None:
        with pytest.raises(ValidationError) as caught:
            render(template(["x {{" + name + "}}"]), variables)
        assert caught.value.field == f"variables.{name}"

    @pytest.mark.parametrize("variables", [b"[]", b"5", b"null", b"{", b"", b'{"a":"\\ud800"}'])
    def test_variables_must_be_an_object(self, variables: bytes) -> None:
        with pytest.raises(ValidationError) as caught:
            render(template("{{a}}"), variables)
        assert caught.value.field == "variables"

    def test_the_result_is_bounded_while_it_grows(self) -> None:
        made = template(["{{a}}" * 10_000])
        tracemalloc.start()
        try:
            with pytest.raises(ValidationError) as caught:
                render(made, {"a": "x" * 60_000})
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()
        assert caught.value.field == "variables"

    def test_the_limit_is_64_kib(self) -> None:
        made = template(["{{a}}"])
        assert len(bytes(render(made, {"a": "x" * (65536 - 4)}))) == 65536
        with pytest.raises(ValidationError):
            render(made, {"a": "x" * (65536 - 3)})

    def test_depth_is_counted_after_filling_in(self) -> None:
        made = template(b"[" * 32 + b'"{{a}}"' + b"]" * 32)
        render(made, b'{"a":' + b"[" * 32 + b"]" * 32 + b"}")
        with pytest.raises(ValidationError, match="64 deep"):
            render(made, b'{"a":' + b"[" * 33 + b"]" * 33 + b"}")

    def test_variables_nested_without_end_are_refused(self) -> None:
        with pytest.raises(ValidationError):
            render(template("{{a}}"), b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}")

    def test_a_large_object_is_opened_once(self) -> None:
        names = [f"k{number}" for number in range(2_000)]
        made = template(["{{a." + name + "}}" for name in names])
        values = {name: number for number, name in enumerate(names)}
        assert msgspec.json.decode(render(made, {"a": values})) == list(range(2_000))

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.text(max_size=4), inner, max_size=4)
            ),
            max_leaves=10,
        ),
        st.text(),
    )
    def test_whatever_is_inserted_stays_where_it_was_put(self, value: Any, around: str) -> None:
        around = "-" + around.replace("{", "(").replace("}", ")")
        payload = {"a": "{{v.w}}", "b": f"{around}{{{{ v.w }}}}{around}", around: around}
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        assert rendered(payload, {"v": {"w": value}}) == {
            "a": value,
            "b": f"{around}{text}{around}",
            around: around,
        }


class TestMemoryTemplates:
    def test_keeps_each_tenants_apart(self) -> None:
        store = MemoryTemplates()
        made = template({}, id="a")
        assert store.create("acme", made) is made
        assert store.get("acme", "a") is made
        with pytest.raises(NotFound):
            store.get("other", "a")
        assert list(store.list("other")) == []

    def test_lists_by_id(self) -> None:
        store = MemoryTemplates()
        for id in ("b", "c", "a"):
            store.create("acme", template({}, id=id))
        assert [made.id for made in store.list("acme")] == ["a", "b", "c"]

    def test_a_taken_id_is_a_conflict(self) -> None:
        store = MemoryTemplates()
        store.create("acme", template({}))
        with pytest.raises(Conflict):
            store.create("acme", template({}))

    def test_replacing_keeps_the_time_of_creation(self) -> None:
        store = MemoryTemplates()
        store.create("acme", template({"a": "{{x}}"}, now=1.0))
        replaced = store.replace("acme", template({"b": "{{x}}"}, now=2.0))
        assert (replaced.created_at, replaced.updated_at) == (1.0, 2.0)
        assert store.get("acme", "order-created") is replaced
        assert bytes(render(replaced, {"x": 1})) == b'{"b":1}'

    def test_what_is_not_there_is_not_found(self) -> None:
        store = MemoryTemplates()
        with pytest.raises(NotFound):
            store.replace("acme", template({}))
        with pytest.raises(NotFound):
            store.delete("acme", "order-created")

    def test_deletes(self) -> None:
        store = MemoryTemplates()
        store.create("acme", template({}))
        store.delete("acme", "order-created")
        with pytest.raises(NotFound):
            store.get("acme", "order-created")
        store.create("acme", template({}))

    def test_is_bounded(self) -> None:
        store = MemoryTemplates(max_per_tenant=2)
        for id in ("a", "b"):
            store.create("acme", template({}, id=id))
        with pytest.raises(Conflict, match="2 templates"):
            store.create("acme", template({}, id="c"))
        store.create("other", template({}, id="c"))


class Store:
    """Templates that others write too, as in Redis; `down` is a fault that a test switches, `slow`
    lets an answer come later."""

    def __init__(self) -> None:
        self.memory = MemoryTemplates()
        self.asked = 0
        self.down = False
        self.slow: asyncio.Event | None = None

    async def _reach(self) -> None:
        self.asked += 1
        if self.down:
            raise Unavailable("The store is down.")

    async def get(self, tenant: str, id: str) -> Template:
        await self._reach()
        found = self.memory.get(tenant, id)
        if self.slow is not None:
            await self.slow.wait()
        return found

    async def list(self, tenant: str) -> Sequence[Template]:
        await self._reach()
        return self.memory.list(tenant)

    async def create(self, tenant: str, template: Template) -> Template:
        await self._reach()
        return self.memory.create(tenant, template)

    async def replace(self, tenant: str, template: Template) -> Template:
        await self._reach()
        return self.memory.replace(tenant, template)

    async def delete(self, tenant: str, id: str) -> None:
        await self._reach()
        self.memory.delete(tenant, id)


class Cache:
    """A cache before a store, for templates that are called by a letter."""

    def __init__(self, max_cached: int = 10) -> None:
        self.store = Store()
        self.now = 100.0
        self.cached = CachedTemplates(
            self.store, seconds=5, max_cached=max_cached, clock=lambda: self.now
        )

    async def get(self, id: str = "a", tenant: str = "acme") -> float:
        """When it was last written."""
        return (await settled(self.cached.get(tenant, id))).updated_at


class TestCachedTemplates:
    async def test_the_store_is_asked_once_in_a_while(self) -> None:
        cache = Cache()
        cache.store.memory.create("acme", template({}, id="a", now=1.0))
        assert await cache.get() == 1
        cache.store.memory.replace("acme", template({}, id="a", now=2.0))
        asked = cache.store.asked
        cache.now += 4.9
        assert not is_awaitable(cache.cached.get("acme", "a"))
        assert (await cache.get(), cache.store.asked) == (1, asked)
        cache.now += 0.1
        assert (await cache.get(), cache.store.asked) == (2, asked + 1)

    async def test_its_own_writes_are_seen_at_once(self) -> None:
        cache = Cache()
        await cache.cached.create("acme", template({}, id="a", now=1.0))
        assert await cache.get() == 1
        replaced = await cache.cached.replace("acme", template({}, id="a", now=2.0))
        assert (replaced.created_at, await cache.get()) == (1, 2)
        assert [each.id for each in await settled(cache.cached.list("acme"))] == ["a"]
        await cache.cached.delete("acme", "a")
        with pytest.raises(NotFound):
            await cache.get()

    async def test_what_was_read_before_a_write_is_not_kept_after_it(self) -> None:
        cache = Cache()
        await cache.cached.create("acme", template({}, id="a", now=1.0))
        cache.store.slow = asyncio.Event()
        reading = asyncio.create_task(cache.get())
        await asyncio.sleep(0)
        await cache.cached.replace("acme", template({}, id="a", now=2.0))
        cache.store.slow.set()
        assert await reading == 1
        assert await cache.get() == 2

    async def test_tenants_are_apart(self) -> None:
        cache = Cache()
        await cache.cached.create("acme", template({}, id="a"))
        await cache.get()
        with pytest.raises(NotFound):
            await cache.get(tenant="other")

    async def test_while_the_store_is_down_the_last_known_one_is_given(self) -> None:
        cache = Cache()
        await cache.cached.create("acme", template({}, id="a", now=1.0))
        await cache.get()
        cache.now += 1000
        cache.store.down = True
        assert await cache.get() == 1
        with pytest.raises(Unavailable):
            await cache.get("b")
        with pytest.raises(Unavailable):
            await cache.cached.replace("acme", template({}, id="a", now=2.0))
        # Nobody knows whether that was written.
        with pytest.raises(Unavailable):
            await cache.get()

    async def test_what_others_deleted_is_gone_after_a_while(self) -> None:
        cache = Cache()
        await cache.cached.create("acme", template({}, id="a"))
        await cache.get()
        cache.store.memory.delete("acme", "a")
        cache.now += 5
        with pytest.raises(NotFound):
            await cache.get()
        cache.store.down = True
        with pytest.raises(Unavailable):
            await cache.get()

    async def test_those_used_last_are_kept(self) -> None:
        cache = Cache(max_cached=2)
        for id in ("a", "b", "c"):
            await cache.cached.create("acme", template({}, id=id))
        for id in ("a", "b", "a", "c"):
            await cache.get(id)
        asked = cache.store.asked
        for id in ("a", "c"):
            await cache.get(id)
        assert cache.store.asked == asked
        await cache.get("b")
        assert cache.store.asked == asked + 1

    async def test_refusals_come_through(self) -> None:
        cache = Cache()
        await cache.cached.create("acme", template({}, id="a"))
        with pytest.raises(Conflict):
            await cache.cached.create("acme", template({}, id="a"))
        with pytest.raises(NotFound):
            await cache.cached.delete("acme", "b")
