"""The HTTP service of a label holder: predictions for single requests, health, metrics, version, documentation."""

import asyncio
import hmac
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sl_queue.data.asked_ids import id_columns, request_keys
from sl_queue.errors import ComputeError, SlQueueError
from sl_queue.launch.answering_versions import id_key
from sl_queue.launch.service import LabelHolderService
from sl_queue.loops.requests import Outcome, Unanswered
from sl_queue.loops.serving import LabelService
from sl_queue.protocol.event_json import finite
from sl_queue.protocol.serving import FAILED, MOST_ROWS, OTHER_RUN, Keys

log = logging.getLogger("sl_queue")

Answer = Future[Outcome]

MOST_BYTES = 1024 * 1024  # of a request
BODY_S = 10.0  # within which the body of a request must come
_LEFT = 499  # counts clients that left before their request was there; nobody gets it
_PAGE = """<!doctype html><html lang="en"><title>sl_queue</title><h1>Predictions</h1>
<pre>POST /predict {&quot;ids&quot;: EXAMPLE}</pre>
<p>200: a prediction for each id, or <code>missing</code>: parties that lack it. 401: a token is needed.
408: the body came too slowly. 409: parties hold other weights. 413: too large. 422: ids of another type.
429: hourly limit. 500: a model failed on these rows. 503: one was silent.</p>
<p><a href="/openapi.json">openapi.json</a> <a href="/version">version</a> <a href="/health">health</a>
<a href="/metrics">metrics</a></p></html>
"""
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class _Asker:
    """An event loop's requests to a service. Mutable: it knows which wait, and which are answered.

    What the loop reads in one turn goes as one message; what that brings wakes the loop once.
    """

    def __init__(self, service: LabelService) -> None:
        self._service = service
        self._answered: deque[tuple[asyncio.Future[Answer], Answer]] = deque()
        self._going = self._woken = False

    async def predict(self, keys: Keys) -> Outcome:
        """Ask for these rows. Raises Unanswered, SlQueueError."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Answer] = loop.create_future()
        if not self._going:
            self._going = True
            loop.call_soon(self._go)
        self._service.add(keys).add_done_callback(partial(self._take, loop, waiting))
        return (await waiting).result()

    def _go(self) -> None:
        self._going = False
        self._service.go()

    def _take(self, loop: asyncio.AbstractEventLoop, waiting: "asyncio.Future[Answer]", answer: Answer) -> None:
        """Take an answer, on the thread that it comes on."""
        self._answered.append((waiting, answer))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._woken = False  # before the last look: what comes after that wakes the loop again
        while self._answered:
            waiting, answer = self._answered.popleft()
            if not waiting.done():  # the client has gone
                waiting.set_result(answer)


@dataclass(slots=True)
class Api:
    """The routes. Mutable: it counts requests by how they ended."""

    holder: LabelHolderService
    id_type: str  # of the ids in the label holder's own table
    token: str | None
    failure: Callable[[], SlQueueError | None] = lambda: None
    ended: Counter[int] = field(default_factory=Counter)
    rows: int = 0
    _key: bytes = field(init=False, repr=False)  # of the ids in a request
    _asker: "_Asker" = field(init=False)

    def __post_init__(self) -> None:
        self._key, self._asker = id_key(self.holder.job), _Asker(self.holder.service)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/predict", self.predict, methods=["POST"]),
            Route("/health", self.health),
            Route("/version", self.version),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/docs", self.docs),
        ]
        return Starlette(routes=routes)

    async def predict(self, request: Request) -> Response:
        """Answer `{"ids": [...]}` with a prediction for each id, or the parties that lack it."""
        try:
            answer = await self._predict(request)
        except ClientDisconnect:
            answer = _said(_LEFT, "the client has left")
        except Exception as error:  # a bug: it is this request's alone
            log.exception("a request failed")
            answer = _said(500, f"{type(error).__name__}; the log of the service says more")
        self.ended[answer.status_code] += 1
        return answer

    async def _predict(self, request: Request) -> Response:
        if not self._may(request):
            return _said(401, "a token is needed: Authorization: Bearer TOKEN")
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(request)
        except TimeoutError:
            return _said(408, f"the body of a request must come within {BODY_S:g} s")
        if body is None:
            return _said(413, f"a request has at most {MOST_BYTES} bytes")
        try:
            ids = json.loads(body)["ids"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return _said(422, 'a request is JSON like {"ids": [10017, 10018]}')
        if not isinstance(ids, list) or not ids or len(ids) > MOST_ROWS:
            return _said(422, f"ids must be a list of 1 to {MOST_ROWS}")
        keys, wrong = request_keys(ids, self.id_type, self._key, self.holder.spec.table)
        if keys is None:
            columns = id_columns(self.holder.spec.table)
            form = f"lists of {len(columns)}: {', '.join(columns)}" if columns else f"of type {self.id_type}"
            return _said(422, f"ids must be {form}", places=wrong[:10])
        try:
            outcome = await self._asker.predict(keys)
        except Unanswered as error:
            return _unanswered(error)
        except ComputeError as error:
            return _said(500, str(error))
        except SlQueueError as error:
            return _said(503, str(error))
        self.rows += len(ids)
        said = {"run": outcome.run, "predictions": _predictions(ids, outcome)}
        try:
            return JSONResponse(said, headers=_HEADERS)
        except ValueError:  # NaN or infinity, for which JSON has null
            return JSONResponse(finite(said), headers=_HEADERS)

    async def health(self, request: Request) -> Response:
        """Answer 200 while the link to the broker stands."""
        failure = self.failure()
        if failure is not None:
            return _said(503, str(failure))
        return JSONResponse({"run": self.holder.models.run}, headers=_HEADERS)

    async def version(self, request: Request) -> Response:
        """Answer with the version in use."""
        version = self.holder.models.version
        about = {"run": version.run, "step": version.step, "job": version.job, "finished_at": version.finished_at}
        return JSONResponse(about, headers=_HEADERS)

    async def metrics(self, request: Request) -> Response:
        """Answer with counters for Prometheus."""
        lines = ["# TYPE sl_queue_serve_requests_total counter"]
        lines += [f'sl_queue_serve_requests_total{{status="{code}"}} {n}' for code, n in sorted(self.ended.items())]
        lines += ["# TYPE sl_queue_serve_rows_total counter", f"sl_queue_serve_rows_total {self.rows}"]
        return PlainTextResponse("\n".join(lines) + "\n", headers=_HEADERS)

    async def openapi(self, request: Request) -> Response:
        """Answer with the description of these routes."""
        return JSONResponse(description(self.id_type, len(id_columns(self.holder.spec.table))), headers=_HEADERS)

    async def docs(self, request: Request) -> Response:
        """Answer with a page that says how to ask."""
        example = "[10017, 10018]" if self.id_type == "integer" else '["a-17", "a-18"]'
        if columns := id_columns(self.holder.spec.table):
            example = json.dumps([["a", 17, *[1] * (len(columns) - 2)]])
        return HTMLResponse(_PAGE.replace("EXAMPLE", example), headers=_HEADERS)

    def _may(self, request: Request) -> bool:
        if self.token is None:
            return True
        said = request.headers.get("authorization", "")
        return hmac.compare_digest(said.encode("latin-1"), f"Bearer {self.token}".encode())


def description(id_type: str, columns: int = 0) -> dict[str, Any]:
    """Return the OpenAPI description of the service; `columns`: of an id of several."""
    one: Mapping[str, Any] = {"type": "integer" if id_type == "integer" else "string"}
    if columns:
        part = {"type": ["string", "integer"]}
        one = {"type": "array", "items": part, "minItems": columns, "maxItems": columns}
    body = {"type": "object", "required": ["ids"], "properties": {"ids": {"type": "array", "items": one}}}
    said = {"description": "what is wrong, in `error`"}
    found = {"description": "a prediction for each id, in order; null is a number that is not finite"}
    answers = dict.fromkeys(("401", "408", "409", "413", "422", "429", "500", "503"), said)
    predict = {
        "summary": "Predict for rows that all parties hold",
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": found, **answers},
    }
    about = {"get": {"summary": "Version in use", "responses": {"200": {"description": "run, step, job"}}}}
    paths = {"/predict": {"post": predict}, "/version": about}
    return {"openapi": "3.1.0", "info": {"title": "sl_queue", "version": "1"}, "paths": paths}


async def _body(request: Request) -> bytes | None:
    """Read a request up to its limit; None beyond it, without reading on."""
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > MOST_BYTES:
        return None
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _predictions(ids: Sequence[Any], outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {"id": one, "missing": list(lacking)} if found is None else {"id": one, **found}
        for one, found, lacking in zip(ids, outcome.predictions, outcome.lacking, strict=True)
    ]


def _said(status: int, error: str, **more: Any) -> JSONResponse:
    return JSONResponse({"error": error, **more}, status_code=status, headers=_HEADERS)


def _unanswered(error: Unanswered) -> JSONResponse:
    if OTHER_RUN in error.refused.values():
        parties = [party for party, why in error.refused.items() if why == OTHER_RUN]
        return _said(409, f"{', '.join(parties)} cannot answer with this run's weights", parties=parties)
    if FAILED in error.refused.values():
        parties = [party for party, why in error.refused.items() if why == FAILED]
        return _said(500, f"{', '.join(parties)} could not compute these rows; its log says why", parties=parties)
    if error.refused:
        return _said(429, f"{', '.join(error.refused)} answers no more in this hour", parties=list(error.refused))
    return _said(
        503, f"no answer of {', '.join(error.silent)}", missing=list(error.silent), silent_s=round(error.after_s, 1)
    )
