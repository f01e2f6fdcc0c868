"""A vLLM server that is played: it answers as vLLM does, and as its script says."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_sip.rollout.vllm.gloo_group import GlooGroup, open_store
from megatron_sip.rollout.vllm.packing import cut, num_bytes, unpacked
from tests.rollout.vllm_claims import VOCAB


class PlayedServer:
    """Answers as vLLM does; ``script`` changes what comes next for a path: a status, or a function of the body."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.version = "default"
        self.script: dict[str, list[Any]] = {}
        self.longest = 64
        self.info = {
            "model_config": {"logprobs_mode": "raw_logprobs", "model": "/nowhere"},
            "scheduler_config": {"enable_chunked_prefill": False},
            "device_config": {"device_type": "cuda"},
        }
        self.vocab = VOCAB
        self.weights: dict[str, torch.Tensor] = {}
        self.group: GlooGroup | None = None
        self.chunk_bytes = 0
        self.losses = 0
        """Transfers in which it will be lost."""
        played = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self._answer(json.loads(self.rfile.read(length)) if length else None)

            def _answer(self, body: Any) -> None:
                status, reply = played.reply(self.path, body)
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, name: str) -> list[Any]:
        return [body for path, body in self.calls if path == name]

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append((path, body))
        waiting = self.script.get(path.partition("?")[0], [])
        if waiting:
            planned = waiting.pop(0)
            if isinstance(planned, int):
                return planned, {"error": {"message": "EngineCore encountered an issue.", "code": planned}}
            return 200, planned(body)
        match path.partition("?")[0]:
            case "/v1/models":
                return 200, {"data": [{"max_model_len": self.longest}]}
            case "/server_info":
                return 200, {"vllm_config": self.info}
            case "/is_paused":
                return 200, {"is_paused": False}
            case "/weight_info":
                return 200, {"weight_version": self.version}
            case "/update_weight_version":
                self.version = body["new_version"]
                return 200, {"success": True}
            case "/collective_rpc":
                files = Path(body["kwargs"]["weights_path"]).glob("*.safetensors")
                self.weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
                return 200, {"results": [None]}
            case "/get_world_size":
                return 200, {"world_size": 1}
            case "/init_weight_transfer_engine":
                return self._join(body["init_info"])
            case "/start_weight_update":
                return 200, {"message": "Weight update started"}
            case "/update_weights":
                return self._receive(body["update_info"])
            case "/finish_weight_update":
                if body is None:
                    return 500, {"error": {"message": "finish_weight_update called without a start", "code": 500}}
                self.version = body["weight_version"]
                return 200, {"message": "Weight update finished"}
            case "/reset_prefix_cache":
                return 200, {"success": True}
            case "/pause" | "/resume":
                return 200, {"status": "done"}
            case "/inference/v1/generate":
                return self._generate(body)
        return 404, {"detail": "Not Found"}

    def _join(self, info: dict[str, Any]) -> tuple[int, Any]:
        self.chunk_bytes = info["chunk_bytes"]
        store = open_store(info["master_address"], info["master_port"], False, 20.0)
        self.group = GlooGroup(store, info["master_address"], info["rank_offset"], info["world_size"], 20.0)
        return 200, {"message": "Weight transfer initialized"}

    def _receive(self, info: dict[str, Any]) -> tuple[int, Any]:
        types = [getattr(torch, name) for name in info["dtype_names"]]
        assert self.group is not None
        for entries in cut(zip(info["names"], types, info["shapes"], strict=True), self.chunk_bytes):
            chunk = torch.empty(sum(num_bytes(dtype, shape) for _, dtype, shape in entries), dtype=torch.uint8)
            self.group.broadcast(chunk).wait()
            self.weights |= dict(unpacked(chunk, entries))
            if self.losses:
                self.losses -= 1
                self.group = None
                return 500, {"error": {"message": "Connection closed by peer", "code": 500}}
        return 200, {"message": "Weights updated"}

    def _generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        wanted = body["sampling_params"]
        if max(map(int, wanted.get("logit_bias", {0: 0.0}))) >= self.vocab:
            return 400, {"error": {"message": "logit_bias contain out-of-vocab token ids", "code": 400}}
        choices = [choice(i, wanted["max_tokens"], self.version) for i in range(wanted.get("n", 1))]
        return 200, {"choices": choices[::-1]}


def choice(index: int, length: int, version: str, **changes: Any) -> dict[str, Any]:
    """``length`` times the token 10 + index, at -1 nat each."""
    scored = [{"token_id": 10 + index, "logprob": -1.0} for _ in range(length)]
    return {
        "index": index,
        "finish_reason": "length",
        "token_ids": [10 + index] * length,
        "weight_versions": [{"version": version, "start": 0, "end": length}],
        "logprobs": {"content": scored},
        **changes,
    }
