"""Planning: what a configuration needs on a machine that is not there, read off the compiled programs."""
