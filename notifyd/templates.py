"""Templates: payloads with `{{placeholders}}`, kept per tenant, filled in by the sender.

A template is compiled once into pieces of JSON text and the placeholders between them, so that
filling it in is a join of bytes, numbers keep the digits they came with, and nothing can get out of
the string that it is inserted into.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import msgspec

from notifyd.errors import Conflict, NotFound, Unavailable, ValidationError
from notifyd.eventually import Eventually, settled
from notifyd.identifiers import timestamp_text
from notifyd.notification import MAX_NOTIFICATION_BYTES, MAX_PAYLOAD_DEPTH, Priority
from notifyd.wire import nested_too_deep, normalise_payload

MAX_TEMPLATE_BYTES = 65536
MAX_TEMPLATES = 10_000
"""Templates that one tenant may have."""

CACHE_SECONDS = 5.0
"""How long a template is taken from memory before the store is asked again."""

MAX_CACHED = 1000
"""Templates kept in memory beside a store: 64 MiB of them at most."""

MAX_NAME = 128
MAX_EVENT_TYPE = 128
MAX_TTL = 31_536_000

_ID = re.compile(r"[A-Za-z0-9_.-](?:[A-Za-z0-9_.:-]{0,62}[A-Za-z0-9_.-])?")

# A string, and the colon that makes it a key (there is no white space in normalised JSON). Unrolled
# so that nothing backtracks.
_STRING = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")(:?)')
_PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
_PATH = re.compile(r"[^\s.]+(?:\.[^\s.]+)*")

_decode_string = msgspec.json.Decoder(str).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode

Path = tuple[str, ...]
T = TypeVar("T")


class Placeholder(msgspec.Struct, frozen=True):
    """Where a variable goes; one that is its whole string keeps the variable's JSON type."""

    path: Path
    whole: bool


class Template(msgspec.Struct, frozen=True, dict=True):
    """A payload to be filled in, with the defaults of its notifications; checked by `new_template`.

    `payload_template` is normalised JSON; `ttl` is in seconds; `created_at` and `updated_at` are
    Unix seconds.
    """

    id: str
    name: str
    event_type: str
    payload_template: msgspec.Raw
    priority: Priority = Priority.NORMAL
    ttl: int | None = None
    created_at: float = 0.0
    updated_at: float = 0.0

    @cached_property
    def parts(self) -> tuple[bytes | Placeholder, ...]:
        """JSON text and placeholders in turn, compiled on first use and kept.

        Raises ValidationError for a placeholder that cannot be read.
        """
        return tuple(_compile(bytes(self.payload_template)))

    def answer(self) -> dict[str, object]:
        """The template as the API shows it: ready to be encoded, times in RFC 3339."""
        return {
            "id": self.id,
            "name": self.name,
            "event_type": self.event_type,
            "payload_template": self.payload_template,
            "priority": self.priority.value,
            "ttl": self.ttl,
            "created_at": timestamp_text(self.created_at),
            "updated_at": timestamp_text(self.updated_at),
        }


def new_template(
    *,
    id: str,
    name: str,
    event_type: str,
    payload_template: msgspec.Raw | bytes,
    now: float,
    priority: Priority = Priority.NORMAL,
    ttl: int | None = None,
) -> Template:
    """A template whose every field was checked, compiled already; `now` is in Unix seconds.

    `payload_template` is JSON in strict UTF-8. Raises ValidationError naming the field.
    """
    if not _ID.fullmatch(id):
        raise ValidationError(
            "id must be 1 to 64 letters, digits, '-', '_' or '.', and ':' inside.",
            field="id",
            constraint="1 to 64 of letters, digits, '-', '_', '.', and ':' inside",
        )
    _check_length(name, "name", MAX_NAME)
    _check_length(event_type, "event_type", MAX_EVENT_TYPE)
    if ttl is not None and not 0 <= ttl <= MAX_TTL:
        raise ValidationError(
            f"ttl must be 0 to {MAX_TTL} seconds.", field="ttl", constraint=f"0 to {MAX_TTL}"
        )
    if len(payload_template := bytes(payload_template)) > MAX_TEMPLATE_BYTES:
        raise ValidationError(
            f"payload_template is {len(payload_template)} bytes; at most {MAX_TEMPLATE_BYTES} are"
            " taken.",
            field="payload_template",
            constraint=f"at most {MAX_TEMPLATE_BYTES} bytes",
        )
    payload = normalise_payload(payload_template, "payload_template")
    template = Template(id, name, event_type, payload, priority, ttl, now, now)
    template.parts  # noqa: B018  # compiled now, so that a bad placeholder is refused here
    return template


def _check_length(text: str, field: str, most: int) -> None:
    if not 1 <= len(text) <= most:
        raise ValidationError(
            f"{field} must have 1 to {most} characters.",
            field=field,
            constraint=f"1 to {most} characters",
        )


# --- compiling ------------------------------------------------------------------------------------


def _compile(payload: bytes) -> list[bytes | Placeholder]:
    """Normalised JSON cut at the placeholders in its string values; keys are left alone."""
    parts: list[bytes | Placeholder] = []
    literal = bytearray()
    done = 0
    for token in _STRING.finditer(payload):
        string, colon = token.groups()
        if colon or "{{" not in (text := _decode_string(string)):
            continue
        literal += payload[done : token.start()]
        done = token.end()
        pieces = list(_pieces(text))
        quote = b"" if (whole := len(pieces) == 1 and isinstance(pieces[0], tuple)) else b'"'
        literal += quote
        for piece in pieces:
            if isinstance(piece, str):
                literal += _inside(piece)
                continue
            if literal:
                parts.append(bytes(literal))
                literal.clear()
            parts.append(Placeholder(piece, whole))
        literal += quote
    parts.append(bytes(literal) + payload[done:])
    return parts


def _pieces(text: str) -> Iterator[str | Path]:
    """Text and the paths of placeholders, in turn; empty text is left out."""
    done = 0
    for found in _PLACEHOLDER.finditer(text):
        if found.start() > done:
            yield text[done : found.start()]
        yield _path(found[1].strip())
        done = found.end()
    if done < len(text):
        yield text[done:]


def _path(name: str) -> Path:
    if not _PATH.fullmatch(name):
        raise ValidationError(
            f"'{{{{{name[:100]}}}}}' is not a placeholder: a variable's name is needed, with dots"
            " between the names of what it is nested in.",
            field="payload_template",
            constraint="placeholders like {{name}} or {{order.total}}",
        )
    path = tuple(name.split("."))
    if len(path) > MAX_PAYLOAD_DEPTH:
        raise ValidationError(
            f"A placeholder reaches more than {MAX_PAYLOAD_DEPTH} deep.",
            field="payload_template",
            constraint=f"nested at most {MAX_PAYLOAD_DEPTH} deep",
        )
    return path


def _inside(text: str) -> bytes:
    """`text` as it stands inside a JSON string, without the quotes."""
    return _encode(text)[1:-1]


# --- filling in -----------------------------------------------------------------------------------


class _Variables:
    """The sender's variables as JSON text, each looked up, and each object opened, once."""

    __slots__ = ("_objects", "_texts", "_values")

    def __init__(self, variables: msgspec.Raw | bytes | Mapping[str, Any]) -> None:
        data = _encode(variables) if isinstance(variables, Mapping) else bytes(variables)
        try:
            top = _decode_object(normalise_payload(data, "variables"))
        except msgspec.ValidationError as error:
            raise ValidationError(
                "variables must be an object.", field="variables", constraint="an object"
            ) from error
        self._objects: dict[Path, dict[str, msgspec.Raw]] = {(): top}
        self._values: dict[Path, bytes] = {}
        self._texts: dict[Path, bytes] = {}

    def value(self, path: Path) -> bytes:
        """The variable as JSON. Raises ValidationError where there is none."""
        value = self._values.get(path)
        if value is None:
            value = self._values[path] = self._find(path)
        return value

    def text(self, path: Path) -> bytes:
        """The variable as it stands inside a JSON string: a string as it is, the rest as JSON."""
        text = self._texts.get(path)
        if text is None:
            value = self.value(path)
            if value.startswith(b'"'):
                text = value[1:-1]
            elif value.startswith((b"{", b"[")):
                text = _inside(value.decode())
            else:
                text = value
            self._texts[path] = text
        return text

    def _find(self, path: Path) -> bytes:
        found = self._object(path[:-1]).get(path[-1])
        if found is None:
            name = ".".join(path)
            raise ValidationError(
                f"The template needs the variable {name}.",
                field=f"variables.{name}",
                constraint="required",
            )
        return bytes(found)

    def _object(self, path: Path) -> dict[str, msgspec.Raw]:
        """The object at `path`; one without members where there is none."""
        known = self._objects.get(path)
        if known is None:
            found = bytes(self._object(path[:-1]).get(path[-1], b""))
            known = self._objects[path] = _decode_object(found) if found[:1] == b"{" else {}
        return known


def render(template: Template, variables: msgspec.Raw | bytes | Mapping[str, Any]) -> msgspec.Raw:
    """The template's payload with every placeholder filled in: normalised JSON.

    `variables` is a JSON object, as strict UTF-8 or as a mapping of what msgspec can encode. For a
    string that is nothing but a placeholder the variable itself is put, of whatever type; elsewhere
    the variable's text is inserted (`12.50`, `true`, `null`; objects and lists as compact JSON).
    Variables that no placeholder names are ignored. Raises ValidationError: for a missing variable
    naming it (`variables.a.b`), and where the result is over 64 KiB or nested more than 64 deep.
    """
    parts = template.parts
    if len(parts) == 1 and isinstance(parts[0], bytes):
        return template.payload_template
    filled = _Variables(variables)
    pieces: list[bytes] = []
    size = 0
    for part in parts:
        if isinstance(part, bytes):
            piece = part
        elif part.whole:
            piece = filled.value(part.path)
        else:
            piece = filled.text(part.path)
        # Measured before anything is joined: pieces are shared, so that a large variable that is
        # named ten thousand times costs no memory before it is refused.
        size += len(piece)
        if size > MAX_NOTIFICATION_BYTES:
            raise ValidationError(
                f"The template is over {MAX_NOTIFICATION_BYTES} bytes when filled in.",
                field="variables",
                constraint=f"at most {MAX_NOTIFICATION_BYTES} bytes when filled in",
            )
        pieces.append(piece)
    payload = b"".join(pieces)
    if nested_too_deep(payload):
        raise ValidationError(
            f"The template is nested more than {MAX_PAYLOAD_DEPTH} deep when filled in.",
            field="variables",
            constraint=f"nested at most {MAX_PAYLOAD_DEPTH} deep",
        )
    return msgspec.Raw(payload)


# --- keeping --------------------------------------------------------------------------------------


class TemplateStore(Protocol):
    """Where templates are kept, each tenant's apart from the others'."""

    def get(self, tenant: str, id: str) -> Eventually[Template]:
        """Raises NotFound."""
        ...

    def list(self, tenant: str) -> Eventually[Sequence[Template]]:
        """All of a tenant's templates, by id."""
        ...

    def create(self, tenant: str, template: Template) -> Eventually[Template]:
        """Raises Conflict for an id that is taken, or when the tenant has as many as it may."""
        ...

    def replace(self, tenant: str, template: Template) -> Eventually[Template]:
        """Put `template` in place of its namesake, whose `created_at` stays; raises NotFound."""
        ...

    def delete(self, tenant: str, id: str) -> Eventually[None]:
        """Raises NotFound."""
        ...


class MemoryTemplates:
    """Templates in this process, gone when it ends."""

    def __init__(self, *, max_per_tenant: int = MAX_TEMPLATES) -> None:
        self._max_per_tenant = max_per_tenant
        self._tenants: dict[str, dict[str, Template]] = {}

    def get(self, tenant: str, id: str) -> Template:
        """Raises NotFound."""
        template = self._tenants.get(tenant, {}).get(id)
        if template is None:
            raise NotFound("There is no template with this id.")
        return template

    def list(self, tenant: str) -> Sequence[Template]:
        """All of a tenant's templates, by id."""
        return sorted(self._tenants.get(tenant, {}).values(), key=lambda template: template.id)

    def create(self, tenant: str, template: Template) -> Template:
        """Raises Conflict for an id that is taken, or when the tenant has as many as it may."""
        templates = self._tenants.get(tenant, {})
        if template.id in templates:
            raise Conflict(f"There is a template '{template.id}' already.", field="id")
        if len(templates) >= self._max_per_tenant:
            raise Conflict(f"There are {self._max_per_tenant} templates already, the maximum.")
        self._tenants.setdefault(tenant, templates)[template.id] = template
        return template

    def replace(self, tenant: str, template: Template) -> Template:
        """Put `template` in place of its namesake, whose `created_at` stays; raises NotFound."""
        template = msgspec.structs.replace(
            template, created_at=self.get(tenant, template.id).created_at
        )
        self._tenants[tenant][template.id] = template
        return template

    def delete(self, tenant: str, id: str) -> None:
        """Raises NotFound."""
        self.get(tenant, id)
        templates = self._tenants[tenant]
        del templates[id]
        if not templates:
            del self._tenants[tenant]


class _Cached(msgspec.Struct, frozen=True, gc=False):
    template: Template
    fresh_until: float


class CachedTemplates:
    """A store's templates, those used last in memory: `get` is immediate for `seconds` after one.

    What this process writes it sees at once, what others write after `seconds`. While the store is
    down the last known one is given, however old. `clock` is in seconds and only grows.
    """

    def __init__(
        self,
        store: TemplateStore,
        *,
        seconds: float = CACHE_SECONDS,
        max_cached: int = MAX_CACHED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._seconds = seconds
        self._max_cached = max_cached
        self._clock = clock
        self._cached: OrderedDict[tuple[str, str], _Cached] = OrderedDict()
        self._writes = 0

    def get(self, tenant: str, id: str) -> Eventually[Template]:
        """Raises NotFound; Unavailable where the store is down and the template not known here."""
        cached = self._cached.get((tenant, id))
        if cached is not None:
            self._cached.move_to_end((tenant, id))
            if self._clock() < cached.fresh_until:
                return cached.template
        return self._ask(tenant, id, cached)

    async def _ask(self, tenant: str, id: str, cached: _Cached | None) -> Template:
        writes = self._writes
        try:
            template = await settled(self._store.get(tenant, id))
        except Unavailable:
            if cached is None:
                raise
            return cached.template
        except NotFound:
            self._cached.pop((tenant, id), None)
            raise
        if writes == self._writes:
            # Otherwise this may be what stood there before.
            self._keep(tenant, template)
        return template

    def list(self, tenant: str) -> Eventually[Sequence[Template]]:
        """All of a tenant's templates, by id; always the store's."""
        return self._store.list(tenant)

    async def create(self, tenant: str, template: Template) -> Template:
        """Raises Conflict for an id that is taken, or when the tenant has as many as it may."""
        return await self._written(tenant, template.id, self._store.create(tenant, template))

    async def replace(self, tenant: str, template: Template) -> Template:
        """Put `template` in place of its namesake, whose `created_at` stays; raises NotFound."""
        return await self._written(tenant, template.id, self._store.replace(tenant, template))

    async def delete(self, tenant: str, id: str) -> None:
        """Raises NotFound."""
        await self._written(tenant, id, self._store.delete(tenant, id))

    async def _written(self, tenant: str, id: str, writing: Eventually[T]) -> T:
        """What `writing` gives; the template is not known meanwhile, and not after a failure that
        leaves open whether it was written."""
        self._forget(tenant, id)
        try:
            return await settled(writing)
        finally:
            self._forget(tenant, id)

    def _forget(self, tenant: str, id: str) -> None:
        self._writes += 1
        self._cached.pop((tenant, id), None)

    def _keep(self, tenant: str, template: Template) -> None:
        key = tenant, template.id
        self._cached[key] = _Cached(template, self._clock() + self._seconds)
        self._cached.move_to_end(key)
        if len(self._cached) > self._max_cached:
            self._cached.popitem(last=False)
