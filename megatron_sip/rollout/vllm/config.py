"""Options of rollouts by vLLM servers."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError


@dataclass(frozen=True)
class VllmOptions:
    """Where rollouts come from, and how servers get the weights."""

    rollout_engine: str = option(
        "in_process",
        choices=("in_process", "vllm"),
        help="who samples rollouts: in_process, the ranks that train, or vllm, servers that get the weights",
    )
    rollout_endpoints: tuple[str, ...] = option(
        (), help="vLLM servers as http://HOST:PORT; each request goes to the least busy one", metavar="URL"
    )
    rollout_sync_interval: int = option(
        1, help="optimizer steps between two transfers of the weights to the servers; above 1 rollouts are stale"
    )
    rollout_weight_transfer: str = option(
        "files",
        choices=("files", "gloo", "nccl"),
        help="how servers get the weights: files in --rollout-weights-folder; or from memory to memory by vLLM's "
        "weight-transfer interface, over nccl between GPUs, over gloo to servers on CPU",
    )
    rollout_sync_timeout_s: float = option(
        300.0,
        help="seconds of a transfer, in which servers that are lost may also come back; without any the run ends",
    )
    rollout_weights_folder: str = option(
        "/dev/shm",
        help="folder in which weights are handed to the servers, seen by them under the same path: memory on one host, "
        "a shared file system across hosts",
        metavar="DIR",
    )
    rollout_importance_cap: float = option(
        0.0,
        help="weight judged rows by the ratio of their rollouts' likelihood now and when sampled, at most this; 0: no",
    )
    rollout_max_in_flight: int = option(256, help="requests under way per data-parallel replica, one per prefix")
    rollout_max_attempts: int = option(5, help="attempts of one request before the servers are looked at")
    rollout_request_timeout_s: float = option(400.0, help="seconds of one attempt")
    rollout_give_up_s: float = option(480.0, help="seconds in which rollouts are asked for again while servers fail")
    rollout_api_key_env: str = option("ROLLOUT_API_KEY", help="environment variable that holds the servers' API key")

    def validate_vllm(self) -> None:
        """Raises ConfigurationError for a value that cannot work."""
        if self.rollout_engine == "vllm" and not self.rollout_endpoints:
            raise ConfigurationError(
                "--rollout-endpoints is missing: --rollout-engine vllm needs servers; tools/export_policy.py prints "
                "the command that starts one"
            )
        for url in self.rollout_endpoints:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
                raise ConfigurationError(
                    f"--rollout-endpoints has {url!r}: give URLs like http://HOST:8000, without /v1"
                )
        for name in ("rollout_sync_interval", "rollout_max_in_flight", "rollout_max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1.")
        for name in ("rollout_request_timeout_s", "rollout_give_up_s", "rollout_sync_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give seconds above 0.")
        if not self.rollout_importance_cap >= 0:
            raise ConfigurationError(
                f"--rollout-importance-cap is {self.rollout_importance_cap}: give 0 (no correction), or at least 1."
            )
