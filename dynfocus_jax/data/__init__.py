"""From files to batches: media, sources, conversations, tokens, the input pipeline, synthetic benchmarks."""
