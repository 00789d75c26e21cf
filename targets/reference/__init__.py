"""The reference target: torch interprets the program as it is. The oracle of every test."""
