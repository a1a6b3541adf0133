"""What a method may ask for beside keys and features, by name, and in which slot it is had.

"frames", "pixels", "channels", "resized" and "text" are asked for by their names alone; see :class:`saint.methods.Method`.
"""

# whose attention is looked at in a layer of a language model
LAST, QUESTION, FIRST, RATERS = "last_query", "question", "first_query", "raters"
QUERIES = frozenset({LAST, QUESTION, FIRST, RATERS})

# what a method in front of a language model may ask of the vision tower, at the layers that it looks at, and a method inside an
# encoder of the layer where tokens leave: attention received, mean over heads and all tokens of the picture; that of the class
# token, mean over heads; the same of all heads as one, of their queries and keys side by side; the length of the value, all heads
# side by side; keys, mean over heads, in front of a language model. Where there is no class token, attention received stands for
# its attention
TOWER_RECEIVED, TOWER_CLASS, TOWER_JOINED = "tower_received", "tower_class", "tower_joined"
TOWER_VALUES, TOWER_KEYS = "tower_values", "tower_keys"
TOWER_ATTENTION = frozenset({TOWER_RECEIVED, TOWER_CLASS, TOWER_JOINED, TOWER_VALUES})
TOWER = TOWER_ATTENTION | {TOWER_KEYS}

PROVIDES = {
    "vision": frozenset({"frames", "pixels", "channels", "resized"}) | TOWER_ATTENTION,
    "connector": frozenset({"frames", "text"}) | TOWER,
    "language": frozenset({"frames"}) | QUERIES,
}
