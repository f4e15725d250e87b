"""Backbones: vision tower, text encoder, language model, projector and the layers they share."""
