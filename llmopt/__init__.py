"""llmopt: an ahead-of-time compiler for serving large language models."""

__version__ = "0.1.0"
