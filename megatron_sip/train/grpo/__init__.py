"""Trains the teacher, judge or rewriter, by GRPO on the engine that trains the policy."""
