"""Rollouts by vLLM servers behind the same protocol as those of the training ranks (``engine.VllmEngine``)."""
