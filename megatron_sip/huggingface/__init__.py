"""The format of transformers' model directories: names and shapes of tensors, ``config.json``, safetensors, tokenizer.

Below checkpoints, which are converted to it, and below rollouts, whose servers take their weights in it.
"""
