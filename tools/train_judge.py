#!/usr/bin/env python
"""Trains a quality and safety judge by GRPO: reward 1 for the right verdict, 0 for any other (paper, section 3.2.1).

    torchrun --nproc-per-node 8 tools/train_judge.py --config examples/recipes/teacher/judge-llama3.1-8b.yaml

Examples come from tools/make_judge_data.py; what it saves is exported by tools/export_policy.py, or judges in process
(--teacher model).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.train.grpo.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "judge"))
