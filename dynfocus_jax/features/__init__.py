"""Features of the frozen vision tower on disk: extraction, shards and readers."""
