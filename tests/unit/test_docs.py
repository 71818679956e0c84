"""The pages held against the code, both ways: nothing public is missing, nothing is made up."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import notifyd
from notifyd import wire
from notifyd.app import Notifyd
from notifyd.cli import main
from notifyd.connections.lifecycle import reason_for
from notifyd.errors import NotifydError
from notifyd.metrics import Metrics
from notifyd.options import (
    ApiKeySettings,
    AuthSettings,
    ChannelRule,
    ChannelSettings,
    CorsSettings,
    ServerSettings,
    Settings,
    options,
    sections,
)
from notifyd.queue.postgres import MIGRATIONS
from notifyd.settings import load_settings
from tests.docs_tables import DOCS, TABLES, Table, with_table

ROOT = DOCS.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page.name: page.read_text("utf-8") for page in PAGES}

ACCESS = {"anybody": "open", "anybody, from this machine": "open"}
OWN_TO_HTTP = {"INVALID_MESSAGE", "UNSUPPORTED_FORMAT", "SUBSCRIPTION_ERROR", "INVALID_ACK"}


def production() -> Notifyd:
    key = ApiKeySettings(name="shop", key="a key of sixteen characters")
    return Notifyd(
        Settings(
            server=ServerSettings(mode="production"),
            auth=AuthSettings(jwt_secret="s" * 32, api_keys=(key,)),
            cors=CorsSettings(origins=("https://app.example.com",)),
            channels=ChannelSettings(rules={"*": ChannelRule(subscribe="any")}),
        )
    )


def development() -> Notifyd:
    return Notifyd(Settings(auth=AuthSettings(jwt_secret="s" * 32, api_key="k" * 16)))


def section(page: str, heading: str) -> str:
    """What stands below a heading, up to the next of its rank."""
    _, found, rest = TEXTS[page].partition(f"\n## {heading}\n")
    assert found, f"{page} has no heading {heading}"
    return rest.partition("\n## ")[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each row of the tables in a text, without their heads."""
    for line in text.splitlines():
        if line.startswith("| ") and line.endswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])]


def first_code(text: str) -> list[str]:
    """The code that the first cells begin with, in every row that has some."""
    found = (re.match(r"`([^`]+)`", row[0]) for row in rows(text))
    return [match[1] for match in found if match]


def everything() -> str:
    return "\n".join(TEXTS.values())


def blocks(*languages: str) -> list[Any]:
    """The fenced blocks of all pages, as pytest's parameters."""
    found = []
    for name, text in TEXTS.items():
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if match[1] in languages:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[2], id=f"{name}:{line}"))
    return found


# --- what is made from the code -----------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_tables_are_as_the_code_has_them(table: Table) -> None:
    text = TEXTS[table.page]
    assert text == with_table(text, table), "run python -m tests.docs_tables"


def test_a_page_without_the_place_for_its_table() -> None:
    with pytest.raises(ValueError, match="0 places"):
        with_table("# A page\n", TABLES[0])


# --- each public thing once ---------------------------------------------------------------------


def test_every_option_once() -> None:
    known = Counter(option.name for option in options())
    names = "|".join(sections())
    told = Counter(
        name for name in first_code(everything()) if re.fullmatch(rf"(?:{names})\.(?!py$)\w+", name)
    )
    assert told == known


def test_no_option_is_made_up() -> None:
    known = {option.name for option in options()}
    variables = {option.variable for option in options()}
    for name, text in TEXTS.items():
        mentioned = set(re.findall(rf"`((?:{'|'.join(sections())})\.(?!py`)[a-z_]+)`", text))
        assert mentioned <= known, name
        meant = {one.removesuffix("_FILE") for one in re.findall(r"NOTIFYD_[A-Z]+__[A-Z_]+", text)}
        assert meant <= variables, name


def test_every_metric_once() -> None:
    known = Counter(metric.name for metric in Metrics().describe())
    told = Counter(name for name in first_code(everything()) if name.startswith("notifyd_"))
    assert told == known


def test_no_metric_is_made_up() -> None:
    known = {metric.name for metric in Metrics().describe()}
    schema = set(re.findall(r"notifyd_[a-z_]+", "".join(each.sql for each in MIGRATIONS)))
    mentioned = set(re.findall(r"`(notifyd_[a-z_]+)", everything()))
    assert mentioned <= known | schema


def test_every_script_whose_keys_are_not_all_declared() -> None:
    """Those whose arguments have what keys begin with."""
    heads = {
        file.name: file.read_text().partition("\n\n")[0].replace("\n--", "").split()
        for file in Path(notifyd.__file__).parent.rglob("*.lua")
    }
    composing = {
        name for name, head in heads.items() if re.search("key.* begins? with", " ".join(head))
    }
    page = (DOCS / "operations.md").read_text()
    assert set(re.findall(r"`(\w+\.lua)`", page)) == composing


def test_every_route_once_and_who_may_call_it() -> None:
    told = {row[0].strip("`"): row[1] for row in rows(section("http-api.md", "Every route"))}
    told.pop("route")
    realtime = {"GET /ws": "user", "GET /sse": "user"}
    known = {f"{one.method} {one.path}": one.access for one in production().endpoints} | realtime
    demo = {f"{one.method} {one.path}" for one in development().endpoints} - set(known)
    assert {name: ACCESS.get(who, who) for name, who in told.items()} == known | {
        "GET /demo": "open"
    }
    assert len(told) == len(list(rows(section("http-api.md", "Every route")))) - 1
    for route in demo:
        assert f"`{route.removeprefix('GET ')}`" in section("http-api.md", "Every route") or (
            route == "GET /demo"
        )


def test_no_route_is_made_up() -> None:
    known = {f"{one.method} {one.path}" for one in development().endpoints}
    known |= {"GET /ws", "GET /sse"}
    mentioned = set(re.findall(r"`((?:GET|POST|PUT|DELETE) /[^`?]*)", everything()))
    assert mentioned <= known


def test_every_message_of_clients_once() -> None:
    known = Counter(kind.__name__ for kind in get_args(wire.ClientMessage))
    assert Counter(first_code(section("protocol.md", "Messages of a client"))) == known


def test_every_message_of_the_server_once() -> None:
    told = Counter(first_code(section("protocol.md", "Messages of the server")))
    assert told == Counter(server_messages())


def server_messages() -> set[str]:
    """The types that the server's code makes messages of."""
    makers = {"message", "Message", "names_message"}
    found: set[str] = set()
    for path in (ROOT / "notifyd").rglob("*.py"):
        if "client" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                kind = node.args[0]
                if name in makers and isinstance(kind, ast.Constant):
                    found.add(str(kind.value))
    return found


def test_every_close_code_once() -> None:
    told = first_code(section("protocol.md", "Close codes"))
    known = [str(code) for code in range(1000, 5000) if reason_for(code) != "other"]
    assert told == known


def every_error() -> set[type[NotifydError]]:
    found = {NotifydError}
    while more := {heir for one in found for heir in one.__subclasses__()} - found:
        found |= more
    return found - {NotifydError}


def test_every_error_code_once() -> None:
    http = {row[0].strip("`"): row[1] for row in rows(section("http-api.md", "Errors"))}
    http.pop("code")
    errors = every_error()
    assert http == {one.code: str(one.http_status) for one in errors if one.code not in OWN_TO_HTTP}
    told = first_code(section("protocol.md", "Error codes in a connection"))
    assert sorted(told) == sorted({one.code for one in errors} & OWN_TO_HTTP)


def test_every_outcome_once() -> None:
    from notifyd.notification import Outcome

    told = first_code(section("http-api.md", "Publishing").partition("### What became")[2])
    assert sorted(told) == sorted(outcome.value for outcome in Outcome)


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {notifyd.__version__} " in TEXTS["CHANGELOG.md"]


# --- links and blocks ---------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The ids that headings get."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_of_somebodys_machine(page: Path) -> None:
    text = page.read_text("utf-8")
    paths = set(re.findall(r"(?<![\w.:/<…)}*-])/([a-z]+)/", text))
    assert paths <= {"api", "demo", "etc", "health", "opt", "orders", "realtime", "run"}
    hosts = set(re.findall(r"https?://([^/\s:;\"'`>)]+)", text))
    examples = {"app.example.com", "issuer.example.com", "notifyd"}
    assert hosts <= {"127.0.0.1", "semver.org"} | examples


@pytest.mark.parametrize("block", blocks("json"))
def test_json_is_json(block: str) -> None:
    decode = json.JSONDecoder().raw_decode
    rest = block.strip()
    while rest:
        _, end = decode(rest)
        rest = rest[end:].strip()


@pytest.mark.parametrize("block", blocks("toml"))
def test_settings_are_taken(block: str, tmp_path: Path) -> None:
    assert tomllib.loads(block)
    file = tmp_path / "notifyd.toml"
    file.write_text(block, "utf-8")
    load_settings(str(file), {})


@pytest.mark.parametrize("block", blocks("python"))
def test_python_is_python(block: str) -> None:
    ast.parse(block)


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_exist(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines():
        match shlex.split(line, comments=True):
            case ["make", target]:
                assert target in targets
            case [command, *arguments] if command.rpartition("/")[2] == "notifyd":
                with pytest.raises(SystemExit) as ended:
                    main([*arguments, "--help"])
                assert ended.value.code == 0
                usage = capsys.readouterr().out
                assert all(flag in usage for flag in arguments if flag.startswith("--"))
            case [command, *_]:
                assert command in {"curl", "pip", "docker", "redis-cli"}
            case _:
                assert not line.strip()
