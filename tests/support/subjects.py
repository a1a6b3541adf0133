"""Subjects of the lab around models of tests."""

import dataclasses

from saint.lab import kinds


def fixed(model, inputs):
    """The subject around ``model`` that is always given ``inputs``, or what they make of an image where they are a function."""
    found = kinds.around(model)

    class Fixed(type(found)):
        def inputs(self, items, images):
            return inputs(images[0]) if callable(inputs) else inputs

    return Fixed(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})
