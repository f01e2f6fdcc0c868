#!/usr/bin/env bash
# 1.4B from scratch, safety: 21,000 steps of RF-NLL on the better of a rewrite and a rollout. See launch.sh for variables.
# On 8 GPUs the same batch of 256 takes 8 micro-batches a step; the paper had 64 GPUs.
exec "$(dirname "$0")/launch.sh" examples/recipes/scratch-safety.yaml "$@"
