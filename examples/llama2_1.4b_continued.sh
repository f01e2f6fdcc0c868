#!/usr/bin/env bash
# 1.4B continued: 2,000 steps of online DPO on the suffix and 16 rollouts. See launch.sh for variables.
#   GOAL=quality|factuality|safety   which scores the judge gives
goal=${GOAL:-quality}
exec "$(dirname "$0")/launch.sh" "examples/recipes/continued-$goal.yaml" "$@"
