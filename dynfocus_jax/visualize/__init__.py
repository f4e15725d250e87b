"""Pictures of the frames that a model chose."""
