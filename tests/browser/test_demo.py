"""/demo in a real browser: what a newcomer sees after `make run`."""

from __future__ import annotations

import pytest
from playwright.async_api import Locator, Page, expect

from tests.browser.conftest import WAIT_MS
from tests.conftest import StartServer
from tests.front_door import Host, channel, user

# Text that would run if anything took it for HTML.
HOSTILE = "<img src=x onerror=\"document.title='run'\">"

_WATCH = """
    window.violations = [];
    addEventListener("securitypolicyviolation", (e) => violations.push(e.violatedDirective));
"""


class Demo:
    """The page and what its console said."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", lambda said: self._said(said.type, said.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _said(self, type: str, text: str) -> None:
        if type in {"error", "warning"}:
            self.complaints.append(text)

    async def open(self, url: str) -> None:
        """Open the page, and wait until both users are connected and follow the channel."""
        await self.page.add_init_script(_WATCH)
        await self.page.goto(f"{url}/demo")
        for user_id in ("alice", "bob"):
            await self.state(user_id, "connected")
            await self.shows(user_id, "Follows orders")

    def card(self, user_id: str) -> Locator:
        """The part of the page that is this user's."""
        return self.page.locator(f"#user-{user_id}")

    async def state(self, user_id: str, text: str) -> None:
        """Wait for this state of the user's connection."""
        await expect(self.card(user_id).locator(".state")).to_have_text(text, timeout=WAIT_MS)

    def entry(self, user_id: str, event_type: str) -> Locator:
        """The notification of this type in the user's list."""
        return self.card(user_id).locator(".entry").filter(has_text=event_type)

    async def shows(self, user_id: str, text: str) -> None:
        """Wait until exactly one entry of the user's list has this text."""
        await expect(self.entry(user_id, text)).to_have_count(1, timeout=WAIT_MS)

    async def publish(self, target: str, event_type: str) -> None:
        """Fill in the form and send it."""
        await self.page.locator(".targets label").filter(has_text=target).click()
        await self.page.fill("#event-type", event_type)
        await self.page.click("#publish button[type=submit]")

    async def result(self, text: str) -> None:
        """Wait for this answer beside the button."""
        await expect(self.page.locator("#result")).to_have_text(text, timeout=WAIT_MS)

    async def is_clean(self) -> None:
        """Nothing was complained of, by the script, the console or the policy."""
        assert self.complaints == []
        assert await self.page.evaluate("window.violations") == []


@pytest.fixture
async def host(start_on: StartServer) -> Host:
    return await start_on()


@pytest.fixture
async def demo(page: Page, host: Host) -> Demo:
    demo = Demo(page)
    await demo.open(host.url)
    return demo


async def test_what_the_form_publishes_arrives_on_both_sides(demo: Demo) -> None:
    for user_id, transport in (("alice", "websocket"), ("bob", "sse")):
        await expect(demo.card(user_id).locator(".transport")).to_have_value(transport)

    await demo.publish("everybody", "to.everybody")
    await demo.result("delivered · to 2 connections")
    await demo.publish("the channel", "to.channel")
    await demo.result("delivered · to 2 connections")
    await demo.publish("alice", "to.alice")
    await demo.result("delivered · to 1 connection")
    await demo.publish("bob", "to.bob")

    for user_id, event_type in (
        ("alice", "to.everybody"),
        ("bob", "to.everybody"),
        ("alice", "to.channel"),
        ("bob", "to.channel"),
        ("alice", "to.alice"),
        ("bob", "to.bob"),
    ):
        await demo.shows(user_id, event_type)
        await expect(demo.entry(user_id, event_type)).to_contain_text("acknowledged")
    await expect(demo.entry("alice", "to.bob")).to_have_count(0)
    await demo.is_clean()


async def test_what_others_publish_arrives_and_is_shown_as_text(demo: Demo, host: Host) -> None:
    await host.publish(channel("orders"), HOSTILE, {HOSTILE: HOSTILE}, priority="High")
    await host.publish(user("bob"), "order.shipped", {"order_id": 7}, source=HOSTILE)
    for user_id in ("alice", "bob"):
        await demo.shows(user_id, HOSTILE)
        await expect(demo.entry(user_id, HOSTILE)).to_contain_text("High")
    await demo.shows("bob", '{"order_id":7}')
    assert await demo.page.locator("img").count() == 0
    assert await demo.page.title() == "notifyd demo"
    await demo.is_clean()


@pytest.mark.parametrize("user_id", ["alice", "bob"])
async def test_what_came_meanwhile_is_replayed_until_it_is_acknowledged(
    demo: Demo, user_id: str
) -> None:
    card = demo.card(user_id)
    await card.get_by_role("button", name="Disconnect").click()
    await demo.state(user_id, "not connected")
    await demo.publish(user_id, "meanwhile")
    await demo.result("queued · waits for 1 user")

    await card.get_by_label("Auto-ack").uncheck()
    await card.get_by_role("button", name="Connect").click()
    await demo.shows(user_id, "meanwhile")
    await expect(demo.entry(user_id, "meanwhile")).to_contain_text("replayed")

    await card.get_by_role("button", name="Disconnect").click()
    await demo.state(user_id, "not connected")
    await card.get_by_role("button", name="Connect").click()
    await expect(demo.entry(user_id, "meanwhile")).to_contain_text("came again")
    await demo.entry(user_id, "meanwhile").get_by_role("button", name="Ack").click()
    await expect(demo.entry(user_id, "meanwhile")).to_contain_text("acknowledged")
    await demo.is_clean()


@pytest.mark.parametrize("user_id", ["alice", "bob"])
async def test_a_channel_is_left_and_followed_again(demo: Demo, host: Host, user_id: str) -> None:
    card = demo.card(user_id)
    await card.get_by_role("button", name="Leave orders").click()
    await expect(card.locator(".follow")).to_have_text("Follow orders")
    await demo.state(user_id, "connected")
    await demo.publish("the channel", "first")
    await demo.result("delivered · to 1 connection")
    await card.get_by_role("button", name="Follow orders").click()
    await expect(card.locator(".follow")).to_have_text("Leave orders")
    await expect(demo.entry(user_id, "Follows orders")).to_have_count(2)
    await demo.publish("the channel", "second")
    await demo.shows(user_id, "second")
    await expect(demo.entry(user_id, "first")).to_have_count(0)
    await demo.is_clean()


async def test_both_can_change_places(demo: Demo) -> None:
    await demo.card("alice").locator(".transport").select_option("sse")
    await demo.card("bob").locator(".transport").select_option("websocket")
    for user_id in ("alice", "bob"):
        await expect(demo.entry(user_id, "Follows orders")).to_have_count(2)
    await demo.publish("everybody", "after.the.change")
    for user_id in ("alice", "bob"):
        await demo.shows(user_id, "after.the.change")
    await demo.is_clean()


async def test_mistakes_are_told(demo: Demo) -> None:
    await demo.page.fill("#payload", "{")
    await demo.publish("alice", "never")
    await expect(demo.page.locator("#result")).to_contain_text("The payload is not JSON")
    await demo.page.fill("#payload", "{}")
    await demo.page.fill("#channel", "no such name!")
    await demo.publish("the channel", "never")
    await expect(demo.page.locator("#result")).to_contain_text("422")


async def test_an_administrator_ends_a_connection_for_good(demo: Demo, host: Host) -> None:
    answer = await host.post("/api/v1/users/alice/disconnect", {"reason": "enough"})
    assert answer.status_code == 200
    await demo.state("alice", "closed")
    await expect(demo.card("alice").locator(".note")).to_contain_text("4003: enough")
    await expect(demo.card("alice").locator(".toggle")).to_have_text("Connect")


async def test_a_revoked_token_is_replaced(demo: Demo, host: Host) -> None:
    # The next token must be issued in a later second than the revocation.
    host.clock.advance(2)
    await host.post("/api/v1/users/bob/disconnect", {"revoke": True})
    host.clock.advance(2)
    await demo.state("bob", "connected")
    await expect(demo.entry("bob", "Follows orders")).to_have_count(2, timeout=WAIT_MS)
