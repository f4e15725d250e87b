"""Text to tokens: tokenizers, chat templates and conversations."""
