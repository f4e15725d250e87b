"""Parameter-free mathematics: pure functions of arrays, static shapes, no randomness drawn inside."""
