"""Making and checking shards: generate, convert, validate, inspect."""
