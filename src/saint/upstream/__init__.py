"""All that is assumed about other people's code, and nothing else: a renaming in a release is mended here.

``names`` spells arguments, methods and fields; ``specs`` says what a row of a table holds; ``timm``, ``transformers``,
``open_clip`` and ``families`` are the tables; ``verify`` holds a row against an instance before anything is touched;
``versions`` says which releases the tests have seen.
"""
