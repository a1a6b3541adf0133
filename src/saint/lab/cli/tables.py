"""`saint list` and `saint env`."""

import re
from typing import Any

from . import options
from .common import out, table


def list_(json: options.Json = None) -> None:
    """List what is supported: encoders, language models with images and without, methods, recipes, demo models, plug-ins."""
    from ... import methods
    from ...presets import recipes
    from ...upstream import registry
    from ...upstream.decoders import TEXT
    from .. import demo
    from ..demo import scenes, small_llava, smollm2

    encoders: dict[tuple[str, str], list[str]] = {}
    for spec in registry.encoders().values():
        encoders.setdefault((spec.library, spec.title), []).append(spec.encoder.rpartition(".")[2])
    rows = [[library, title, ", ".join(classes)] for (library, title), classes in encoders.items()]
    table(["library", "models", "class that is pruned"], rows, "vision encoders", numbers=False)

    families = registry.families().values()
    head = ["library", "models", "stages"]
    rows = [[family.library, family.title, ", ".join(family.stages)] for family in families]
    table(head, rows, "vision-language models", numbers=False)
    rows = [["transformers", title, "language"] for title in TEXT.values()]
    table(head, rows, "language models without images", numbers=False)

    refused = registry.refused()
    rows = [[name.rpartition(".")[2], why] for name, why in refused.items()]
    table(["class", "why not"], rows, "refused by name", numbers=False)

    known = {name: methods.get(name) for name in methods.names()}
    rows = [
        [name, ", ".join(sorted(method.stages)), f"{_first_line(method)} ({method.paper})"]
        for name, method in known.items()
    ]
    table(["method", "stages", "what it does (paper)"], rows, "methods", numbers=False)
    rows = [[name, about] for name, about in recipes().items()]
    table(["recipe", "what it is"], rows, "recipes (--plan NAME; --keep 0.5 makes a plan for any model)", numbers=False)
    models: dict[str, dict[str, Any]] = {
        name: {"title": m.title, "image_sizes": m.image_sizes, "recipe": m.recipe, "licence": m.licence}
        for name, m in demo.MODELS.items()
    }
    models[small_llava.NAME] = {
        "title": small_llava.TITLE,
        "image_sizes": (scenes.SIDE,),
        "recipe": "",
        "licence": small_llava.LICENCE,
    }
    models[smollm2.NAME] = {
        "title": smollm2.TITLE,
        "image_sizes": (),
        "recipe": "",
        "licence": smollm2.LICENCE,
    }
    rows = [
        [f"demo:{name}", facts["title"], " to ".join(map(str, facts["image_sizes"])), facts["recipe"], facts["licence"]]
        for name, facts in models.items()
    ]
    table(["model", "what it is", "pixels", "recipe", "licence"], rows, "demo models", numbers=False)

    if json is not None:
        from ..records import write_json

        write_json(
            json,
            {
                "kind": "list",
                "encoders": [
                    {"library": library, "models": title, "classes": classes}
                    for (library, title), classes in encoders.items()
                ],
                "families": [
                    {"library": family.library, "models": family.title, "class": family.model, "stages": family.stages}
                    for family in families
                ],
                "texts": [{"library": "transformers", "models": title, "class": cls} for cls, title in TEXT.items()],
                "refused": refused,
                "methods": {
                    name: {"stages": sorted(method.stages), "paper": method.paper} for name, method in known.items()
                },
                "recipes": recipes(),
                "demo": models,
            },
        )


def _first_line(method: Any) -> str:
    """Return what the docstring says first, without its markup."""
    line = (method.__doc__ or "").strip().partition("\n")[0]
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", line).replace("`", "")


def env(json: options.Json = None) -> None:
    """Versions, device and threads: what a bug report needs; and the releases that saint was tested on."""
    from ... import __version__
    from ...upstream.versions import TESTED, VLM_FLOOR
    from ..records import environment, write_json

    facts = environment()
    ranges = {name: f"{oldest} to {newest}" for name, (oldest, newest) in TESTED.items()}
    for name, oldest in VLM_FLOOR.items():
        ranges[f"{name}, vision-language models"] = f"{oldest} to {TESTED[name][1]}"
    out.print(f"saint {__version__}", highlight=False)
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        out.print(f"{name}  {'not installed' if shown is None else shown}", highlight=False, markup=False)
    table(["library", "releases"], [[name, releases] for name, releases in ranges.items()], "tested on", numbers=False)
    if json is not None:
        write_json(json, {"kind": "env", "environment": facts, "tested": ranges})
