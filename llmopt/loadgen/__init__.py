"""The load generator: arrivals, lengths and prompts for any OpenAI server, and what the answers took.

Standard library and numpy alone, so that it runs beside any server without installing anything.
"""
