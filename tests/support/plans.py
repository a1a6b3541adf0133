"""Plans of every stage on tiny vision-language models, and the prompts that they are tried on."""

import torch

import saint
from saint.plans import Plan, Stage
from support.families import IMAGE, cache_of

BATCH = [[4, "0", 7], [3, "0", 2], [6, "0", 12]]  # left padding
PADDED = [[4, "0", 7], [3, "1", 2], [6, "0", 12]]  # and images of two sizes
SPECIAL = list(range(100, 104))  # a random model would write image placeholders
GREEDY = {"do_sample": False, "suppress_tokens": SPECIAL}

LANGUAGE = Stage(saint.Saint(threshold=0.9, keep=0.4), layers=[1, 2])
CONNECTOR = Stage(saint.SaintFullGraph(keep=0.6, step=4))
VISION = Stage(saint.SaintFullGraph(keep=0.7, step=8), layers=[1])
HYBRID = Plan(vision=VISION, connector=CONNECTOR, language=LANGUAGE)
PLANS = {"language": Plan(language=LANGUAGE), "vision": Plan(vision=VISION), "hybrid": HYBRID}
HALF = Stage(saint.Saint(keep=0.5), layers=[0, 1])  # of an encoder


def threshold_at(model, inputs, layer, quantile):
    """A cosine that this share of the even-odd pairs of the visual keys of a layer lies under."""
    with torch.no_grad():
        cache = cache_of(model(**inputs))
    pairs = []
    for row, places in enumerate(inputs["input_ids"] == IMAGE):
        keys = torch.nn.functional.normalize(cache.layers[layer].keys[row, :, places].mean(0), dim=-1)
        pairs.append((keys[0::2] @ keys[1::2].T).flatten())
    return torch.cat(pairs).quantile(quantile).item()
