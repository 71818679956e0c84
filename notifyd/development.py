"""What development makes for itself: a secret and an API key, kept so that they outlive a restart.

They stand in a directory of their own (`.notifyd/`, mode 0700, files 0600) that git ignores.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from notifyd.errors import ConfigurationError
from notifyd.options import HMAC_ALGORITHMS, Settings

DIRECTORY = Path(".notifyd")
SECRET_FILE = "jwt_secret"  # noqa: S105 -- the name of the file, not what is in it
API_KEY_FILE = "api_key"


def with_credentials(
    settings: Settings,
    directory: Path = DIRECTORY,
    *,
    generate: Callable[[int], str] = secrets.token_hex,
) -> Settings:
    """The same settings with a secret and an API key, made now if they were not made before.

    What the settings already have is left alone, and no secret is made where other keys verify the
    tokens. Processes that start together end up with the same ones. `generate` gives a random text
    of twice as many characters. Raises ConfigurationError if the directory cannot be used.
    """
    auth = settings.auth
    wanted = _wanted(settings)
    if SECRET_FILE in wanted:
        secret = _keep(directory / SECRET_FILE, lambda: generate(32))
        auth = msgspec.structs.replace(auth, jwt_secret=secret)
    if API_KEY_FILE in wanted:
        key = _keep(directory / API_KEY_FILE, lambda: f"dev_{generate(16)}")
        auth = msgspec.structs.replace(auth, api_key=key)
    return msgspec.structs.replace(settings, auth=auth)


def with_kept_credentials(settings: Settings, directory: Path = DIRECTORY) -> Settings:
    """The same, but with what is already there alone: for clients of a server that made it."""
    auth = settings.auth
    wanted = _wanted(settings)
    if SECRET_FILE in wanted and (secret := _read(directory / SECRET_FILE)):
        auth = msgspec.structs.replace(auth, jwt_secret=secret)
    if API_KEY_FILE in wanted and (key := _read(directory / API_KEY_FILE)):
        auth = msgspec.structs.replace(auth, api_key=key)
    return msgspec.structs.replace(settings, auth=auth)


def _wanted(settings: Settings) -> set[str]:
    auth = settings.auth
    wanted: set[str] = set()
    if settings.production:
        return wanted
    other_keys = auth.jwt_public_key is not None or auth.jwks_url is not None
    if not auth.jwt_secrets and not other_keys and HMAC_ALGORITHMS & set(auth.jwt_algorithms):
        wanted.add(SECRET_FILE)
    if not auth.api_keys:
        wanted.add(API_KEY_FILE)
    return wanted


def _keep(path: Path, make: Callable[[], str]) -> str:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if kept := _read(path):
            return kept
        _write_once(path.parent / ".gitignore", "*\n")
        _write_once(path, make() + "\n")
    except OSError as error:
        raise ConfigurationError(
            f"{path}: cannot be written ({error.strerror}); start in a directory of your own, or "
            "set auth.jwt_secret and auth.api_key"
        ) from error
    # Another process may have been first; what stands in the file is what counts.
    kept = _read(path)
    if not kept:
        raise ConfigurationError(f"{path}: is empty; remove it, and it is made anew")
    return kept


def _read(path: Path) -> str:
    """The one line of a kept file, which nobody else may read from now on; empty without one."""
    try:
        text = path.read_text("utf-8").strip()
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path}: cannot be read ({error}); remove it, and it is made anew"
        ) from error
    return text


def _write_once(path: Path, text: str) -> None:
    """Write a file (mode 0600) that appears whole or not at all; an existing one is left alone.

    A link fails where the name is taken, so that of several processes exactly one wins and none
    ever reads half a file.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
