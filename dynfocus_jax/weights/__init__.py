"""Published checkpoints: file readers, tables of parameter names, strict merge into our trees, and export."""
