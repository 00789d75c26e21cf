"""Passes, one a file; the directory is the registry (llmopt.registry finds a pass by its file name)."""
