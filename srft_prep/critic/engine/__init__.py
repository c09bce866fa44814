"""Models that run here: the processes that hold vLLM's engines, and what local critics share."""
