"""A real vLLM server for the tests of this folder: `make test-vllm`. One server serves all tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.server import PYTHON_VARIABLE, VllmServer, vllm_server
from tests.vllm.tiny_model import write_tiny_model
from tests.vllm.training import Home, free_port, home


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    skip = pytest.mark.skip(
        reason=f"needs a vLLM environment: `make test-vllm`, or name its python in {PYTHON_VARIABLE}"
    )
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(900))  # a test may start two servers, each of which may take START_S
            if not os.environ.get(PYTHON_VARIABLE):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """Interpreter of the environment that has vLLM."""
    return os.environ[PYTHON_VARIABLE]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random model with tokenizer and chat template."""
    directory = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def vllm(vllm_python: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A running server."""
    with vllm_server(vllm_python, tiny_model, tmp_path_factory.mktemp("vllm") / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def trained(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A policy in training."""
    with home(tmp_path_factory.mktemp("training"), vllm_python) as found:
        yield found


@pytest.fixture(scope="session")
def rollout_server(trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A server of it that no test ends."""
    with trained.server(free_port(), tmp_path_factory.mktemp("rollouts") / "server.log") as server:
        yield server
