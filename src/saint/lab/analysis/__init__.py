"""What tokens do per layer: quantities, their intervals over images, and whether they fall into stages.

``similarity``, ``attention``, ``geometry``: pure functions on the tensors of one image. ``bootstrap``: intervals over images.
``stages``: whether the curves over layers have steps.
"""
