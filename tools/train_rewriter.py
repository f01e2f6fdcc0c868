#!/usr/bin/env python
"""Trains a rewriter by GRPO: copy what is safe, make safe what is not (paper, section 3.2.1, eq. 1 and 2).

    torchrun --nproc-per-node 8 tools/train_rewriter.py --config examples/recipes/teacher/rewriter-llama3.1-8b.yaml

Examples come from tools/make_judge_data.py; what it saves is exported by tools/export_policy.py, or judges in process
(--teacher model).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.train.grpo.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "rewriter"))
