"""Mutation testing: what may be wrong (operators), which tests run a line (lines), a try (trying), what came out (record)."""
