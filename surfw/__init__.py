"""surfw runs transformer models whose weights are somewhere else, or are bigger than memory."""

__version__ = "0.1.0"
