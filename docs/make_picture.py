"""Draw docs/images/kept.png: what ``saint.apply(model, keep=0.5)`` keeps of a typical photograph of the demo.

    python docs/make_picture.py

Typical is the photograph in the middle of the demo's that a camera took, by tokens kept and, where these are equal as under a
fixed budget, by the cosine of its pruned with its unpruned embedding. The drop points behind the first are drawn.
"""

from pathlib import Path

import torch
from PIL import Image

import saint
from saint.lab import demo
from saint.lab.kinds import Encoder
from saint.lab.kinds.agreement import agreement
from saint.lab.sources.items import Item
from saint.lab.view.overlay import save_png
from saint.lab.view.strips import draw, title

MODEL, KEEP = "demo:clip-b16", 0.5
OTHERS = {"hubble_deep_field", "ihc"}  # of a telescope and of a microscope
LIMIT = 200_000  # bytes of a file of this repository
OUT = Path(__file__).parent / "images" / "kept.png"


def main() -> None:
    subject = Encoder.load(MODEL)
    seen = []
    for name, image in demo.photos():
        if name in OTHERS:
            continue
        inputs = subject.inputs([Item.photo(name, image, "")], [image])
        with torch.inference_mode():
            base = subject.model(**inputs)
            with saint.apply(subject.model, keep=KEEP) as session:
                (cosine,) = agreement(base, subject.model(**inputs)).values
                trace = session.trace
        seen.append((int(trace[-1].tokens_out[0]), cosine, name, image, inputs, trace))
    seen.sort(key=lambda photo: photo[:3])
    for kept, cosine, name, *_ in seen:
        print(f"{name}: {kept} tokens kept, cosine {cosine:.3f}")
    kept, cosine, name, image, inputs, trace = seen[len(seen) // 2]
    about = f"saint.apply(model, keep={KEEP:g})  \u00b7  hatched patches were dropped  \u00b7  cosine {cosine:.2f}"
    draw(subject.title, about, title(name), subject.tiles(image, inputs), subject.total(inputs), trace[1:], OUT)
    save_png(Image.open(OUT).convert("RGB"), OUT, LIMIT)
    print(f"wrote {OUT}: {name}, the median of {len(seen)}")


if __name__ == "__main__":
    main()
