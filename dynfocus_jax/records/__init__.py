"""Annotation files to records: entries, formats and mixtures."""
