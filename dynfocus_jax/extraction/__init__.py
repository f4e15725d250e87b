"""Features of the frozen vision tower: which media, through the tower, into shards."""
