"""The judge's side of a step: tokens, seconds of its GPUs, and what of it training has to wait for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sip.errors import ConfigurationError
from megatron_sip.train.dry_run import JudgeCalls
from megatron_sip.train.plan.hardware import JudgeServer


@dataclass(frozen=True)
class JudgeLoad:
    """Questions of a step, in tokens."""

    requests: float
    """Prompts: the votes of one question are written to one prompt (``n`` of a request)."""
    verdicts: float
    prompt_tokens: float
    """Read by the servers, all together, without what their prefix caches have."""
    answer_tokens: float

    def __add__(self, other: JudgeLoad) -> JudgeLoad:
        return JudgeLoad(
            self.requests + other.requests,
            self.verdicts + other.verdicts,
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
        )


def judge_load(calls: JudgeCalls, prefix_tokens: float, suffix_tokens: int, server: JudgeServer) -> JudgeLoad:
    """Pairs show the prefix and both continuations; a pointwise question the prefix and one (at most)."""
    question = server.question
    prefix = prefix_tokens * (1 - question.prefix_cache_hits)
    orders = calls.pair_votes / calls.votes
    pairs = calls.groups * calls.pairs_per_group * orders
    pointwise = calls.groups * calls.pointwise_per_group
    prompt = pairs * (prefix + 2 * suffix_tokens) + pointwise * (prefix + suffix_tokens)
    return JudgeLoad(
        requests=pairs + pointwise,
        verdicts=calls.total,
        prompt_tokens=prompt + (pairs + pointwise) * question.template_tokens,
        answer_tokens=calls.total * question.answer_tokens,
    )


def server_seconds(load: JudgeLoad, server: JudgeServer, prompt_length: float) -> float:
    """Seconds in which one server answers the load, its slots always full.

    Reading: 2 operations per active parameter and token. Writing: a step of a token per slot.
    """
    serving, model = server.serving, server.served_model
    flops = serving.gpu_tflops * 1e12 * serving.gpus_per_server * serving.prefill_efficiency
    read_s = load.prompt_tokens * 2 * model.active_parameters / flops
    slots = serving.sequences_per_server
    return read_s + load.answer_tokens / slots * token_seconds(server, prompt_length, slots)


def token_seconds(server: JudgeServer, prompt_length: float, slots: float) -> float:
    """Seconds of one decode step of a server that writes ``slots`` answers.

    It reads the weights that any of the answers meets, and each sequence's cache. Of experts of which a token takes
    the share e, n tokens meet 1 - (1 - e)^n, if the router spreads them evenly.
    """
    serving, model = server.serving, server.served_model
    bandwidth = serving.gpu_bandwidth_gb_s * 1e9 * serving.gpus_per_server * serving.decode_efficiency
    context = prompt_length + server.question.answer_tokens / 2
    cache = slots * context * model.cache_bytes_per_token
    parameters = model.total_parameters
    if model.expert_share < 1:
        experts = (model.total_parameters - model.active_parameters) / (1 - model.expert_share)
        parameters -= experts * (1 - model.expert_share) ** slots
    return (parameters * model.weight_bytes_per_parameter + cache) / bandwidth


@dataclass(frozen=True)
class JudgeTime:
    """When the verdicts of a step come, from their submission on."""

    busy_s: float
    """Work of the pool: it answers no more than one step's questions in this time."""
    total_s: float
    """From submission to the last verdict: no less, and however large the pool is no less than its answers one after
    the other (rounds of a search)."""


def pool_time(load: JudgeLoad, server: JudgeServer, num_gpus: int, rounds: int, prompt_length: float) -> JudgeTime:
    """The verdicts' time from ``num_gpus`` GPUs of judge servers.

    A round of questions cannot end before its last answer is written; rounds of a pair schedule follow one another.

    Raises:
        ConfigurationError: the GPUs do not make one server.
    """
    num_servers = num_gpus // server.serving.gpus_per_server
    if num_servers < 1:
        raise ConfigurationError(
            f"--judge-gpus {num_gpus} is less than one server of {server.serving.gpus_per_server} GPUs "
            f"({server.name}): give at least that"
        )
    slots = min(server.serving.sequences_per_server, math.ceil(load.verdicts / rounds / num_servers))
    answer_s = server.question.answer_tokens * token_seconds(server, prompt_length, slots)
    busy_s = server_seconds(load, server, prompt_length) / num_servers
    return JudgeTime(busy_s, max(busy_s, rounds * answer_s))


def exposed_wait(judge: JudgeTime, compute_s: float, hidden_s: float, lookahead: int) -> float:
    """Seconds that a step of ``compute_s`` waits for verdicts, once steps are alike.

    Without lookahead only ``hidden_s`` of the step's own work stands between submission and need. With lookahead L the
    verdicts have L steps more: a step of S seconds needs total <= L S + hidden, and the pool needs S >= busy, as
    each step brings it as much again.
    """
    if lookahead == 0:
        return max(0.0, judge.total_s - hidden_s)
    step_s = max(judge.busy_s, (judge.total_s - hidden_s) / lookahead)
    return max(0.0, step_s - compute_s)


def gpus_to_keep_up(load: JudgeLoad, server: JudgeServer, prompt_length: float, compute_s: float) -> int:
    """Fewest judge GPUs that answer a step's questions in a step's time: no fewer can be hidden by any lookahead."""
    return math.ceil(server_seconds(load, server, prompt_length) / compute_s) * server.serving.gpus_per_server


def lookahead_to_hide(judge: JudgeTime, compute_s: float, hidden_s: float) -> int:
    """Steps of lookahead after which verdicts of a pool that keeps up are never waited for."""
    return max(0, math.ceil((judge.total_s - hidden_s) / compute_s))


def gpus_to_hide(
    load: JudgeLoad, server: JudgeServer, rounds: int, prompt_length: float, compute_s: float, hidden_s: float,
    lookahead: int,
) -> int | None:  # fmt: skip
    """Fewest judge GPUs whose verdicts training never waits for; None if no number of them is enough."""
    per_server = server.serving.gpus_per_server

    def hidden(servers: int) -> bool:
        judge = pool_time(load, server, servers * per_server, rounds, prompt_length)
        return exposed_wait(judge, compute_s, hidden_s, lookahead) <= 1e-9 * compute_s

    most = 2 ** math.ceil(math.log2(max(2.0, load.requests)))
    if not hidden(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if hidden(middle) else (middle, high)
    return high * per_server
