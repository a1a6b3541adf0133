"""`saint ui`: a page on this machine."""

import socket
from typing import Annotated

import typer

from . import options
from .common import doing, out


def ui(
    model: Annotated[
        list[str] | None, typer.Option("--model", help=f"offer this model too: {options.MODEL_HELP}; several times")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8765,
    host: Annotated[
        str, typer.Option(help="the address to listen at; anybody who reaches it can use the models")
    ] = "127.0.0.1",
    repeats: Annotated[int, typer.Option(min=1, help="timed pairs per picture")] = 5,
    device: options.Device = "auto",
    threads: options.Threads = None,
    pretrained: options.Pretrained = True,
) -> None:
    """A local page: a picture, one slider, and at once what is kept, how much faster it is, how well outputs agree, the plan.

    Opens with a sample. Offers each --model, and the demo models, which work offline. Nothing leaves this machine and nothing is
    written to disk.
    """
    from ...extras import require

    uvicorn = require("uvicorn", "ui")
    require("starlette", "ui")
    from ..ui.guard import hosts_of  # starlette is there

    hosts_of(host, port)  # a wildcard is refused before anything is loaded
    with doing("starting"):
        import torch

        from ..loading.models import resolve_device
        from ..ui import Desk, make_app, offered

        if threads is not None:
            torch.set_num_threads(threads)
        desk = Desk(offered(model or [], pretrained), str(resolve_device(device)), repeats)
    listening = _listen(host, port)
    own = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    out.print(f"saint ui: http://{shown}:{own} (Ctrl-C ends it)", highlight=False)
    config = uvicorn.Config(
        make_app(desk, hosts_of(host, own)),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,
        limit_concurrency=32,  # connections; the bodies of that many fit into memory
    )
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(
            f"cannot listen at {host}, port {port} ({error.strerror}): give another --port, or --port 0 for any free one"
        ) from error
    return listening
