"""Real services for the tests, each started at its first use and stopped with the session."""
