"""Measures of a trained model's answers and of its choice of frames."""
