"""The application: a page, its scripts, and one address that prunes."""

import inspect
import logging
from importlib import resources
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ... import methods, presets
from ...errors import SaintError
from .asking import LONGEST_PLAN, STAGES, read
from .desk import Desk
from .guard import LARGEST, Guard, plain
from .samples import samples

WAITING = 4  # requests that run or wait for the model; more are sent away
_LOG = logging.getLogger(__name__)
_PAGES = {
    "/": ("ui", "ui.html", "text/html"),
    "/ui.css": ("ui", "ui.css", "text/css"),
    "/ui.js": ("ui", "ui.js", "text/javascript"),
    "/report.css": ("report", "page.css", "text/css"),
    "/report.js": ("report", "page.js", "text/javascript"),
}


def make_app(desk: Desk, hosts: set[str]) -> Starlette:
    """The application.

    Args:
        desk: what runs the models.
        hosts: see :class:`Guard`.
    """
    busy = 0
    limiter = CapacityLimiter(WAITING)
    decoding = CapacityLimiter(1)  # a large picture takes hundreds of MB until it is scaled down

    def page(request: Request) -> Response:
        package, name, kind = _PAGES[request.url.path]
        root = __package__.rpartition(".")[0]
        return Response(
            resources.files(f"{root}.{package}").joinpath(name).read_text(encoding="utf-8"), media_type=kind
        )

    def facts(_: Request) -> Response:
        offers = [{"spec": offer.spec, "asked": offer.asked, "stages": offer.stages} for offer in desk.offers.values()]
        shown = [{"name": sample.name, "question": sample.question} for sample in samples().values()]
        named = [
            {"name": name, "about": about, "stages": [*presets.recipe(name).slots]}
            for name, about in presets.recipes().items()
        ]
        facts = {"models": offers, "methods": _methods(), "recipes": named, "samples": shown}
        return JSONResponse({**facts, "largest": LARGEST, "longest": LONGEST_PLAN})

    def sample(request: Request) -> Response:
        found = samples().get(request.path_params["name"])
        return _error(404, "no such sample") if found is None else Response(found.jpeg(), media_type="image/jpeg")

    async def run(request: Request) -> Response:
        nonlocal busy
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _error(415, "a body of the type application/json is expected")
        if busy >= WAITING:
            return _error(503, f"{busy} requests are waiting already: try again in a moment")
        busy += 1
        try:
            body = await request.body()
            asked = await to_thread.run_sync(read, body, desk.offers, limiter=decoding)
            told = await to_thread.run_sync(desk.run, asked, limiter=limiter)
        except OSError as error:
            return _error(503, plain(error))
        except (SaintError, ValueError, TypeError) as error:
            return _error(400, plain(error))
        except Exception as error:  # whatever a model raises: the page says so, the terminal says where
            _LOG.exception("a request failed")
            return _error(500, f"{type(error).__name__}: {plain(error)} (the terminal shows where)")
        finally:
            busy -= 1
        return JSONResponse(told._asdict())

    routes = [Route(path, page, methods=["GET"]) for path in _PAGES]
    routes += [Route("/facts", facts, methods=["GET"]), Route("/sample/{name}", sample, methods=["GET"])]
    routes += [Route("/run", run, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(Guard, hosts=hosts)])


def _methods() -> list[dict[str, Any]]:
    """Methods that a single picture can be pruned with, and where."""
    made = []
    for name in methods.names():
        method = methods.get(name)
        if "frames" in method.needs:
            continue  # of videos
        where = [stage for stage in STAGES if stage in method.stages and not (stage == "connector" and method.merges)]
        threshold, keep = "threshold" in method.__dataclass_fields__, "keep" in inspect.signature(method).parameters
        made.append({"name": name, "stages": where, "threshold": threshold, "tokens": keep})
    return made


def _error(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status_code=status)
