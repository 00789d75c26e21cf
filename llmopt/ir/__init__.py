"""The IR: torch.fx functions over the llmopt op dialect, a weight table, rewriting, verification and text."""
