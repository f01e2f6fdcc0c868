"""Judges and rewriter behind OpenAI-compatible HTTP endpoints (vLLM and the like).

``config`` needs no HTTP library, so that the trainer can read it; everything else is imported by the teacher process.
"""
