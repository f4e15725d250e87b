"""Records to batches: order, buckets, length budget, samples, the input pipeline, synthetic benchmarks."""
