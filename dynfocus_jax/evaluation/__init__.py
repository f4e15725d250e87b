"""Evaluation of a trained model: published benchmarks, held-out questions, lmms-eval."""
