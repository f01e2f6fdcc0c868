#!/usr/bin/env python
"""Pretrains a language model by Self-Improving Pretraining.

    torchrun --nproc-per-node 8 pretrain_sip.py --config examples/recipes/continued-quality.yaml

Flags win over the recipe; ``--help`` lists them, ``--print-config`` shows what a run would use, ``--dry-run`` checks a
run without starting it.
"""

from __future__ import annotations

import sys

from megatron_sip.train.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
