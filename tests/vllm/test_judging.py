"""Covers judges and rewriter against a real vLLM server with a random model: what its API takes, and what it says."""


def test_a_server_starts(vllm):
    assert '"tiny"' in vllm.get("/v1/models")
