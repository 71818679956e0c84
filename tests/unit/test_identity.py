from __future__ import annotations

import pytest

from notifyd.identity import DEFAULT_TENANT, Identity, Principal, Scope


class TestPrincipal:
    @pytest.mark.parametrize(
        ("scopes", "allowed"),
        [
            ({"read"}, {"read"}),
            ({"publish"}, {"publish"}),
            ({"read", "publish"}, {"read", "publish"}),
            ({"admin"}, {"read", "publish", "admin"}),
            (set(), set()),
        ],
    )
    def test_admin_covers_everything(self, scopes: set[Scope], allowed: set[Scope]) -> None:
        principal = Principal("backend", frozenset(scopes))
        every: list[Scope] = ["read", "publish", "admin"]
        assert {scope for scope in every if principal.may(scope)} == allowed


class TestIdentity:
    def test_by_default_it_may_what_the_rules_allow_and_never_ends(self) -> None:
        identity = Identity("u1")
        assert (identity.tenant, identity.channels) == (DEFAULT_TENANT, None)
        assert (identity.expires_at, identity.roles, identity.subscribe) == (None, (), ())

    def test_cannot_be_changed(self) -> None:
        identity = Identity("u1")
        with pytest.raises(AttributeError):
            identity.user_id = "u2"  # type: ignore[misc]  # that is the point
