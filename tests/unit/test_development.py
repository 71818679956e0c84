from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from notifyd.development import with_credentials, with_kept_credentials
from notifyd.errors import ConfigurationError
from notifyd.settings import ApiKeySettings, AuthSettings, ServerSettings, Settings, problems


def test_a_secret_and_a_key_are_made_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / ".notifyd"
    first = with_credentials(Settings(), directory)
    again = with_credentials(Settings(), directory)

    assert again == first
    assert len(first.auth.jwt_secrets) == 1
    assert len(first.auth.jwt_secrets[0]) >= 64
    assert first.auth.api_keys[0].scopes == ("admin",)
    assert problems(first) == []


def test_only_the_owner_may_read_them(tmp_path: Path) -> None:
    directory = tmp_path / ".notifyd"
    with_credentials(Settings(), directory)

    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert sorted(path.name for path in directory.iterdir()) == [
        ".gitignore",
        "api_key",
        "jwt_secret",
    ]
    for name in ("api_key", "jwt_secret"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600


def test_files_that_others_could_read_are_closed_to_them(tmp_path: Path) -> None:
    with_credentials(Settings(), tmp_path)
    (tmp_path / "api_key").chmod(0o644)
    with_credentials(Settings(), tmp_path)

    assert stat.S_IMODE((tmp_path / "api_key").stat().st_mode) == 0o600


def test_git_ignores_the_directory(tmp_path: Path) -> None:
    with_credentials(Settings(), tmp_path)
    assert (tmp_path / ".gitignore").read_text() == "*\n"


def test_what_is_set_is_left_alone(tmp_path: Path) -> None:
    own = Settings(
        auth=AuthSettings(
            jwt_secret="s" * 32, api_keys=(ApiKeySettings(name="shop", key="k" * 16),)
        )
    )
    assert with_credentials(own, tmp_path) == own
    assert list(tmp_path.iterdir()) == []


def test_no_secret_is_made_where_other_keys_verify_tokens(tmp_path: Path) -> None:
    settings = with_credentials(
        Settings(auth=AuthSettings(jwks_url="https://issuer.example.com/keys")), tmp_path
    )
    assert settings.auth.jwt_secrets == ()
    assert not (tmp_path / "jwt_secret").exists()


def test_production_makes_nothing(tmp_path: Path) -> None:
    settings = Settings(server=ServerSettings(mode="production"))
    assert with_credentials(settings, tmp_path) == settings
    assert list(tmp_path.iterdir()) == []


def test_starts_at_the_same_moment_agree(tmp_path: Path) -> None:
    directory = tmp_path / ".notifyd"
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: with_credentials(Settings(), directory), range(64)))

    assert len({settings.auth.jwt_secrets for settings in made}) == 1
    assert len({settings.auth.api_key for settings in made}) == 1
    assert len(list(directory.iterdir())) == 3


def test_clients_use_what_the_server_made_and_make_nothing(tmp_path: Path) -> None:
    assert with_kept_credentials(Settings(), tmp_path / "none") == Settings()
    assert not (tmp_path / "none").exists()

    made = with_credentials(Settings(), tmp_path)
    assert with_kept_credentials(Settings(), tmp_path) == made


def test_a_directory_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"auth\.jwt_secret and auth\.api_key"):
        with_credentials(Settings(), tmp_path / "file" / ".notifyd")


def test_an_empty_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "jwt_secret").touch()
    with pytest.raises(ConfigurationError, match="jwt_secret: is empty; remove it"):
        with_credentials(Settings(), tmp_path)


def test_a_file_that_is_no_text_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "jwt_secret").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        with_credentials(Settings(), tmp_path)
