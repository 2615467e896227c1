"""What stands before the page: who may ask, and what for.

Gradio answers whoever names the machine as he likes, has many more ways in than this page uses, and opens some files
before the page is asked. So a request gets through to it only if it is one that the page itself makes.
"""

import asyncio
import contextlib
import ipaddress
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gradio.routes import App, ORJSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from .page import Page
from .uploads import NOT_UPLOADED, Refused, Strokes, Uploads

API = "/gradio_api"
# What the page's own JavaScript asks for.
GETS = re.compile(
    rf"/|/(config|info|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.*"
    rf"|{API}/(info|theme\.css|app_id|queue/data|upload_progress|startup-events)/?|{API}/heartbeat/.*|{API}/file=.*"
)
CALLS = re.compile(rf"{API}/(queue/join|run/[\w-]+|cancel|reset)/?")
CALLED_WITH = ("data", "event_data", "fn_index", "trigger_id", "session_hash")
SESSION = re.compile(r"[\w-]{1,64}", re.ASCII)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(?::(\d{1,5}))?", re.ASCII)
MAX_JSON = 2**18  # bytes of a call
FORM = 2**14  # bytes around the file in a form
ARRIVAL = 120.0  # seconds in which a request's body has to be there
UPLOADS_AT_ONCE = 8  # times as many bytes as one may have
CALLS_AT_ONCE = 4  # of one session, waiting or running
GONE = 10.0  # seconds after which a session that does not listen loses its places
UNUSED = "this page has no use for that"

Scope, Receive, Send = dict[str, Any], Callable[[], Awaitable[dict]], Callable[[dict], Awaitable[None]]


class Hosts:
    """The names under which the page may be asked for: of this machine alone, and what its owner says.

    A site may give its own name this machine's address (DNS rebinding), but cannot pass for another name.

    Args:
        listening: the address that is listened on. At 0.0.0.0 and :: every address does as a name.
        others: further names.
    """

    def __init__(self, listening: str, others: Iterable[str] = ()):
        self.others = {name.lower() for name in others}
        self.own = listening.lower().strip("[]")
        self._any_address = self.own in ("0.0.0.0", "::", "")

    def allow(self, host: str | None) -> bool:
        """Whether a Host header, with or without a port, is one of these names."""
        match = HOST.fullmatch((host or "").lower())
        if match is None:
            return False
        name = match[1].strip("[]")
        if name == "localhost" or name == self.own or name in self.others:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._any_address

    def is_own(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` is the one that `host` names, or of one of the further names."""
        try:
            site = urlsplit(origin.lower())
            port = site.port or {"http": 80, "https": 443}[site.scheme]
        except (ValueError, KeyError):  # such as "null"
            return False
        match = HOST.fullmatch(host.lower())
        if site.hostname is None or match is None:
            return False
        return site.hostname in self.others or (
            site.hostname == match[1].strip("[]") and port in ({int(match[2])} if match[2] else {80, 443})
        )


class Guard:
    """ASGI middleware, outside of everything that Gradio has.

    Args:
        app: Gradio's.
        queue_size: drawings that may wait; at most half of the places are for one address.
    """

    def __init__(self, app: Callable, page: Page, hosts: Hosts, uploads: Uploads, queue_size: int):
        self.app, self.page, self.hosts, self.uploads = app, page, hosts, uploads
        self.strokes = Strokes(page.canvas)
        self.places = max(1, queue_size // 2)
        self._arriving = 0  # bytes of uploads
        self._listening: Counter[str] = Counter()  # sessions that hold a stream open
        self._seen: dict[str, float] = {}  # when a session last called, or stopped listening
        self._looks: set[asyncio.Future] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_caller(scope)
            await self._answer(scope, receive, send)
        except Refused as refusal:
            answer = JSONResponse({"detail": refusal.reason, "error": refusal.reason}, refusal.status)
            await answer(scope, receive, send)
        except ClientDisconnect:
            pass

    def _check_caller(self, scope: Scope) -> None:
        """Raise a Refused for a name that is not this page's, and for a call from another site's page."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host") + headers.getlist("x-forwarded-host")  # from which Gradio makes its addresses
        if not headers.getlist("host") or not all(map(self.hosts.allow, hosts)):
            raise Refused(403, "this page is not known by that name: --allowed-hosts adds one")
        for origin in headers.getlist("origin"):
            if not any(self.hosts.is_own(origin, host) for host in hosts):
                raise Refused(403, "another site's page may not use this one")
        visits = scope["method"] in ("GET", "HEAD") and scope["path"] == "/"  # by a link
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not visits:
            raise Refused(403, "another site's page may not use this one")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD") and GETS.fullmatch(path):
            await self._get(path, scope, receive, send)
        elif method == "POST" and CALLS.fullmatch(path):
            await self._call(path, scope, receive, send)
        elif method == "POST" and path.rstrip("/") == f"{API}/upload":
            await self._upload(scope, receive, send)
        elif method == "POST" and path.rstrip("/") == f"{API}/component_server":
            await self._paint(scope, receive, send)
        else:
            raise Refused(404, UNUSED)

    async def _get(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if "deep_link" in query:  # a state that somebody has saved
            raise Refused(404, UNUSED)
        file = path.partition("/file=")[2] if path.startswith(f"{API}/file=") else None
        if file is not None and not self.uploads.holds(file):
            raise Refused(403, NOT_UPLOADED)
        if not path.startswith(f"{API}/queue/data"):
            await self.app(scope, receive, send)
            return
        session = _session(query.get("session_hash", [None])[-1])
        self._listening[session] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._listening[session] -= 1
            self._look_again(session)

    async def _call(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A function of the page, or the end of one; what it is given is read here first."""
        _length(scope, MAX_JSON)
        try:
            body = json.loads(await _read(scope, receive))
        except (ValueError, RecursionError):
            raise Refused(400, "this is not JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "this is not JSON")
        if "session_hash" in body:
            body["session_hash"] = _session(body["session_hash"])
        if path.startswith((f"{API}/queue", f"{API}/run")):
            body = {name: value for name, value in body.items() if name in CALLED_WITH}
            body["data"] = self.uploads.checked(body.get("data"))
            if isinstance(event := body.get("event_data"), dict):
                body["event_data"] = {**event, "value": None}  # of a chosen picture its place is enough
        if path.startswith(f"{API}/queue"):
            self._check_places(body.get("session_hash"), scope)
        content = json.dumps(body).encode()
        headers = [
            (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"content-type")
        ]
        headers += [(b"content-length", b"%d" % len(content)), (b"content-type", b"application/json")]
        await self.app({**scope, "headers": headers}, _given(content, receive), send)

    def _check_places(self, session: str | None, scope: Scope) -> None:
        """Raise a Refused for a client that has enough; look later whether it is there to see what it gets."""
        queue = self.page.blocks._queue
        address = (scope.get("client") or ("",))[0]
        waiting = [event for one in queue.event_queue_per_concurrency_id.values() for event in one.queue]
        of_address = sum((event.request.client or ("",))[0] == address for event in waiting)
        if of_address >= self.places or len(queue.pending_event_ids_session.get(session, ())) >= CALLS_AT_ONCE:
            raise Refused(503, "enough of yours is waiting here")
        if session is not None:
            self._look_again(session)

    def _look_again(self, session: str) -> None:
        """Look after a while whether a session listens."""
        self._seen[session] = time.monotonic()
        look = asyncio.ensure_future(self._forget_if_gone(session, self._seen[session]))
        self._looks.add(look)  # which nothing else holds
        look.add_done_callback(self._looks.discard)

    async def _forget_if_gone(self, session: str, seen: float) -> None:
        """Free the places of a session that does not listen, and stop what is drawn for it."""
        await asyncio.sleep(GONE)
        await asyncio.sleep(1)  # a machine that stood still lets those in first who have come meanwhile
        if self._listening[session] > 0 or self._seen.get(session) != seen:  # else a later look does it
            return
        del self._listening[session]
        self._seen.pop(session, None)
        queue = self.page.blocks._queue
        if queue.pending_event_ids_session.get(session):
            await queue.clean_events(session_hash=session)
            self.page.leave(session)
            queue.pending_event_ids_session.pop(session, None)
            queue.pending_messages_per_session.pop(session, None)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._arrival(scope):
            await asyncio.to_thread(self.uploads.make_room)
            try:
                async with asyncio.timeout(ARRIVAL):
                    await self.app(scope, receive, send)
            except TimeoutError:
                raise Refused(408, "this took too long") from None

    @contextlib.contextmanager
    def _arrival(self, scope: Scope) -> Iterator[None]:
        """A file comes inside the block; raise a Refused where it is too large, or too many come at once."""
        length = _length(scope, self.uploads.most + FORM)
        if self._arriving + length > UPLOADS_AT_ONCE * (self.uploads.most + FORM):
            raise Refused(503, "too much is being uploaded at this moment: try again")
        self._arriving += length
        try:
            yield
        finally:
            self._arriving -= length

    async def _paint(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The one function of a component that the page uses: the canvas takes a part of a painting."""
        with self._arrival(scope):
            content = await _read(scope, receive)
        try:
            async with Request(scope, _given(content, receive)).form(max_files=1, max_fields=8) as form:
                texts = {name: value for name, value in form.items() if isinstance(value, str)}
                files = [await value.read() for value in form.values() if not isinstance(value, str)]
        except (HTTPException, MultiPartException, ValueError, LookupError):  # as python-multipart sees fit
            files = []
        if len(files) != 1:
            raise Refused(400, "this is not a part of a painting")
        of_canvas = texts.get("component_id") == str(self.page.canvas._id)
        if not of_canvas or texts.get("fn_name") != "accept_blobs":
            raise Refused(404, UNUSED)
        self.strokes.put(_session(texts.get("session_hash")), texts, files[0])
        await JSONResponse(None)(scope, receive, send)


class GuardedApp(App):
    """Gradio's application behind a guard, which sees every request before anything of Gradio's does."""

    guard: Guard

    def __init__(self, page: Page, hosts: Hosts, uploads: Uploads, queue_size: int):
        super().__init__(default_response_class=ORJSONResponse)
        self.guard = Guard(super().__call__, page, hosts, uploads, queue_size)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.guard(scope, receive, send)


def _session(name: Any) -> str:
    if not isinstance(name, str) or not SESSION.fullmatch(name):
        raise Refused(400, "this is no session")
    return name


def _length(scope: Scope, most: int) -> int:
    """The bytes of a body, which the server holds a client to.

    Raises:
        Refused: it is too long, or does not say how long it is.
    """
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    if not length.isdecimal() or "transfer-encoding" in headers:
        raise Refused(411, "the length of this is not known")
    if len(length) > 15 or int(length) > most:
        raise Refused(413, f"File size exceeded: at most {most / 2**20:.3g} MB are taken")
    return int(length)


async def _read(scope: Scope, receive: Receive) -> bytes:
    try:
        async with asyncio.timeout(ARRIVAL):
            return await Request(scope, receive).body()
    except TimeoutError:
        raise Refused(408, "this took too long") from None


def _given(content: bytes, receive: Receive) -> Receive:
    """As `receive`, of a body that has been read."""
    left = [content]

    async def again() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return again
