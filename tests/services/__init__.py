"""Real services for the tests, each started at its first use and stopped at the end of the session."""
