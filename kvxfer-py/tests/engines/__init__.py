"""Real vLLM engines for the end-to-end tests."""
