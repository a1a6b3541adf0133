"""`saint list` and `saint env`."""

from typing import Any

from rich.table import Table

from . import options
from .common import out


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
    table = Table("library", "models", "class that is pruned", title="vision encoders", title_justify="left")
    for (library, title), classes in encoders.items():
        table.add_row(library, title, ", ".join(classes))
    out.print(table)

    families = registry.families().values()
    table = Table("library", "models", "stages", title="vision-language models", title_justify="left")
    for family in families:
        table.add_row(family.library, family.title, ", ".join(family.stages))
    out.print(table)

    table = Table("library", "models", "stages", title="language models without images", title_justify="left")
    for title in TEXT.values():
        table.add_row("transformers", title, "language")
    out.print(table)

    refused = registry.refused()
    table = Table("class", "why not", title="refused by name", title_justify="left")
    for name, why in refused.items():
        table.add_row(name.rpartition(".")[2], why)
    out.print(table)

    known = {name: methods.get(name) for name in methods.names()}
    table = Table("method", "stages", "what it does", title="methods (paper)", title_justify="left")
    for name, method in known.items():
        table.add_row(name, "\n".join(sorted(method.stages)), f"{_first_line(method)}\n[dim]{method.paper}[/]")
    out.print(table)

    table = Table("recipe", "what it is", title="recipes (--plan NAME)", title_justify="left")
    for name, about in recipes().items():
        table.add_row(name, about)
    out.print(table)

    table = Table("model", "what it is", "pixels", "recipe", "licence", title="demo models", title_justify="left")
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
    for name, facts in models.items():
        sizes = " to ".join(map(str, facts["image_sizes"]))
        table.add_row(f"demo:{name}", facts["title"], sizes, facts["recipe"], facts["licence"])
    out.print(table)

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
    return (method.__doc__ or "").strip().partition("\n")[0]


def env(json: options.Json = None) -> None:
    """Versions, device and threads: what a bug report needs; and the releases that saint was tested on."""
    from ... import __version__
    from ...upstream.versions import TESTED, VLM_FLOOR
    from ..records import environment, write_json

    facts = environment()
    ranges = {name: f"{oldest} to {newest}" for name, (oldest, newest) in TESTED.items()}
    for name, oldest in VLM_FLOOR.items():
        ranges[f"{name}, vision-language models"] = f"{oldest} to {TESTED[name][1]}"
    table = Table(show_header=False, box=None)
    table.add_row("saint", __version__)
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name, "not installed" if shown is None else str(shown))
    out.print(table)
    table = Table("library", "releases", title="tested on", title_justify="left")
    for name, releases in ranges.items():
        table.add_row(name, releases)
    out.print(table)
    if json is not None:
        write_json(json, {"kind": "env", "environment": facts, "tested": ranges})
