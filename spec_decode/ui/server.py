"""Guards the server: health, size of requests, admission to the queue, and clients that no longer listen.

In: an `Engine` and Gradio's queue. Out: `gr.Blocks` whose server answers `/health`, takes no files, and frees the place
and the device of a client that is gone. A race costs seconds of a device that everybody shares, so none is run for a
client that does not listen to its events, and no client takes all the places in the queue.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from fastapi import HTTPException
from gradio.context import LocalContext
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..session.device import Engine
from .agents import answer_in_json

BODY = 4_000_000  # bytes of a request, far more than the longest prompt of any model
UPLOADS = ("/upload", "/process_recording")
PATIENCE = 5.0  # seconds that an event may go unheard
MEMORY = 60.0  # seconds that the messages of finished events are kept for a client that comes late
SWEEP = 0.5  # seconds between two looks
WAITING = 2  # races that one session may have waiting
SESSIONS = 500  # of which Gradio keeps the state


class Server(gr.Blocks):
    """`gr.Blocks` whose server is guarded by `guard`, from the next `launch` on."""

    guard: Guard | None = None
    current: Mapping[int, Callable[[], Any]] = {}  # by the id of a component: its value for a page that is opened now

    @property
    def config(self) -> Any:
        """What a page begins with. Values of `current` are those of now: if they came with an event after the page was
        drawn, what stands below them would move."""
        for component in self._config["components"]:
            if component["id"] in self.current:
                component["props"]["value"] = self.current[component["id"]]()
        return self._config

    @config.setter
    def config(self, config: Any) -> None:
        self._config = config

    def launch(self, *args: Any, **options: Any) -> Any:
        """As Gradio's own; what `app_kwargs` hold is kept."""
        if self.guard:
            given = options.get("app_kwargs") or {}
            ours = Middleware(Door, guard=self.guard)
            options["app_kwargs"] = {
                **given,
                "middleware": [*given.get("middleware", ()), ours],
                "lifespan": self.guard.lifespan,
            }
            options.setdefault("state_session_capacity", SESSIONS)
        return super().launch(*args, **options)


class Guard:
    """Admits calls to the queue of `blocks`, which must exist, and removes those that nobody listens to."""

    def __init__(self, engine: Engine, blocks: gr.Blocks, *devices: str) -> None:
        """`devices` are the concurrency ids of what takes the device."""
        self.engine = engine
        self.listening: Counter[str] = Counter()  # open event streams by session, or by event
        self._queue = queue = blocks._queue
        self._devices = devices
        # One address, such as a university's, may stand for many people; still it is not to take all places.
        self._most_of_address = max(WAITING, (queue.max_size or 32) // 4)
        self._unheard: dict[str, float] = {}  # event, or session without events → since when nobody listens
        self._push = queue.push
        queue.push = self._admit  # type: ignore[method-assign]
        engine.turns.caller = self._caller

    def _caller(self) -> Callable[[], bool]:
        """Whether the call that this thread works for is over. A call outside of the queue never is."""
        key, events = LocalContext.event_id.get(None), self._queue.event_ids_to_events
        return lambda: key is not None and key not in events

    async def _admit(self, body: Any, request: Any, username: str | None) -> Any:
        """Gradio's `push`, but for calls without all their arguments, and for races of those who have enough of them
        waiting.

        Raises:
            HTTPException: 400 or 429, with a sentence.
        """
        fn = self._queue.blocks.fns.get(body.fn_index)
        if fn is None:
            raise HTTPException(400, "There is no such function here.")
        if len(body.data) < len(fn.inputs):
            raise HTTPException(400, f"The call has {len(body.data)} arguments of {len(fn.inputs)}.")
        if fn.concurrency_id in self._devices:
            line = self._queue.event_queue_per_concurrency_id.get(fn.concurrency_id)
            waiting = line.queue if line else []
            if body.session_hash and sum(e.session_hash == body.session_hash for e in waiting) >= WAITING:
                raise HTTPException(429, f"You have {WAITING} races waiting already; wait until one of them runs.")
            here = address(request)
            if here and sum(address(e.request) == here for e in waiting) >= self._most_of_address:
                raise HTTPException(
                    429, f"{self._most_of_address} races from your address are waiting already; try again later."
                )
        return await self._push(body, request, username)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Sweeps while the server runs."""
        answer_in_json(self._queue.blocks)
        sweeper = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await sweeper

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            try:
                await self.sweep(time.monotonic())
            except Exception:  # one look that fails must not be the last
                traceback.print_exc(file=sys.stderr)

    async def sweep(self, now: float) -> None:
        """Drops events that nobody has listened to for `PATIENCE` seconds, waiting or running, and what Gradio keeps
        of sessions that have none left after `MEMORY` seconds. `now` in seconds."""
        queue, unheard = self._queue, {}
        events = dict(queue.event_ids_to_events)
        for key, event in events.items():
            if self.listening[event.session_hash] or self.listening[key]:
                continue
            unheard[key] = self._unheard.get(key, now)
            if now - unheard[key] >= PATIENCE:
                await queue.clean_events(event_id=key)
        alive = {event.session_hash for event in events.values()}
        for session, ids in list(queue.pending_event_ids_session.items()):
            if session in alive or self.listening[session] or any(self.listening[key] for key in ids):
                continue
            unheard[session] = self._unheard.get(session, now)
            if now - unheard[session] >= MEMORY:
                queue.pending_event_ids_session.pop(session, None)
                queue.pending_messages_per_session.pop(session, None)
        self._unheard = unheard
        self.listening = +self.listening  # without those that are zero
        await self._free_lost()

    async def _free_lost(self) -> None:
        """Frees what Gradio keeps for ever of a call that neither waits nor has a task.

        A call that is cancelled before its task began keeps its place on the device, so that no race could run any
        more. One that is cancelled again while its task cleans up keeps its race open, and the memory of it.
        """
        queue = self._queue
        tasks = [task.get_name() for task in queue._asyncio_tasks]
        if not all("<gradio-sep>" in name for name in tasks):
            return  # Gradio no longer names tasks after their events, or calls in batches: who is lost is not known
        lost = []
        for key, event in queue.event_ids_to_events.items():
            line = queue.event_queue_per_concurrency_id[event.concurrency_id]
            if event in line.queue or any(key in name for name in tasks):
                continue
            lost.append(key)
            if [event] in queue.active_jobs:  # the task never began
                queue.active_jobs[queue.active_jobs.index([event])] = None
                line.current_concurrency -= 1
                line.start_times_per_fn.clear()  # from which waits are estimated
        for key in lost:  # all found before anything is awaited, for another call may begin meanwhile
            del queue.event_ids_to_events[key]
        for key in lost:
            await queue.reset_iterators(key)  # closes the race, once its slice is over


class Door:
    """ASGI middleware: answers `/health`, refuses files and bodies that are too large before they are read, and keeps
    count of who listens to events."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, headers = scope["path"].rstrip("/"), Headers(scope=scope)
        if path.endswith("/health") and path.count("/") == 1:
            return await self._health()(scope, receive, send)
        if scope["method"] in ("POST", "PUT", "PATCH"):
            if path.endswith(UPLOADS) or headers.get("content-type", "").startswith("multipart/"):
                return await _refused(403, "This server takes no files.")(scope, receive, send)
            size = headers.get("content-length", "")
            if size.isdecimal() and int(size) > BODY:
                return await _refused(413, _TOO_LARGE)(scope, receive, send)
            return await self.app(scope, _limited(receive), send)
        heard = _listener(path, scope)
        self.guard.listening[heard] += 1
        try:
            return await self.app(scope, receive, send)
        finally:
            self.guard.listening[heard] -= 1

    def _health(self) -> JSONResponse:
        """200 while the model loads and once it is ready, 503 when it could not be loaded."""
        now = self.guard.engine.status()
        return JSONResponse(
            {"status": now.phase, "message": now.message},
            503 if now.phase == "failed" else 200,
            {"cache-control": "no-store"},
        )


_TOO_LARGE = f"A request may have {BODY // 1_000_000} MB."


def _refused(code: int, message: str) -> JSONResponse:
    # Closed, or the server would go on reading what it has refused.
    return JSONResponse({"detail": message}, code, {"connection": "close"})


def _limited(receive: Receive) -> Receive:
    """`receive` for a body whose length nobody told."""
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > BODY:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return limited


def _listener(path: str, scope: Scope) -> str:
    """The session or event whose messages a request waits for, or nothing."""
    if path.endswith("/queue/data"):
        return "".join(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])[:1])
    parts = path.split("/")
    return parts[-1] if "call" in parts[-4:-2] else ""


def address(request: Request) -> str:
    """Who a request comes from, as far as can be told; nothing on this machine itself, where there is one user.

    Behind a proxy everybody has the proxy's address, and a header has the client's. It is believed only of a proxy,
    which is in a private network, and only the entry that the proxy itself has added, the last.
    """
    host = request.client.host if request.client else ""
    try:
        if ip_address(host).is_private:
            host = request.headers.get("x-forwarded-for", host).split(",")[-1].strip()
        return "" if ip_address(host).is_loopback else host
    except ValueError:
        return host
