"""The application: a page, its scripts, and one address that prunes."""

import inspect
import logging
from importlib import resources

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ... import methods, presets
from ...errors import SaintError
from .asking import STAGES, read
from .desk import Desk
from .guard import LARGEST, Guard, plain

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
        known = {name: methods.get(name) for name in methods.names()}
        offers = [{"spec": offer.spec, "asked": offer.asked} for offer in desk.offers.values()]
        described = [
            {
                "name": name,
                "stages": [stage for stage in STAGES if stage in method.stages],
                "threshold": "threshold" in method.__dataclass_fields__,
                "keep": "keep" in inspect.signature(method).parameters,
            }
            for name, method in known.items()
        ]
        return JSONResponse({"models": offers, "methods": described, "recipes": presets.recipes(), "largest": LARGEST})

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
            html = await to_thread.run_sync(desk.run, asked, limiter=limiter)
        except OSError as error:
            return _error(503, plain(error))
        except (SaintError, ValueError, TypeError) as error:
            return _error(400, plain(error))
        except Exception as error:  # whatever a model raises: the page says so, the terminal says where
            _LOG.exception("a request failed")
            return _error(500, f"{type(error).__name__}: {plain(error)} (the terminal shows where)")
        finally:
            busy -= 1
        return JSONResponse({"html": html})

    routes = [Route(path, page, methods=["GET"]) for path in _PAGES]
    routes += [Route("/facts", facts, methods=["GET"]), Route("/run", run, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(Guard, hosts=hosts)])


def _error(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status_code=status)
