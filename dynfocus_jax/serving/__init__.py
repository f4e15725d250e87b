"""Answering questions with a trained model: the engine, its compiled programs, requests and completions."""
