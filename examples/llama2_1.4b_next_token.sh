#!/usr/bin/env bash
# The next-token baseline of the same length: START=scratch (21,000 steps) or continued (2,000). See launch.sh for variables.
start=${START:-continued}
exec "$(dirname "$0")/launch.sh" "examples/recipes/$start-next-token.yaml" "$@"
