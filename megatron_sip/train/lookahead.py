"""Steps that are prepared ahead: with lookahead L, batch t + L is drawn, generated and submitted before training on t.

What is prepared will be trained on: nothing is prepared beyond the last step, a phase that a probe opens begins with
the first step that has no plan yet, and the queue is part of a checkpoint (``train.pending``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_sip.curriculum import Curriculum, TriggerState
from megatron_sip.data.loader import SampleLoader
from megatron_sip.train.pending import PendingState
from megatron_sip.train.prepare import PreparedStep, Preparer
from megatron_sip.train.teacher_link import RunStopped


class Lookahead:
    """The queue of prepared steps, oldest first."""

    def __init__(
        self,
        preparer: Preparer,
        curriculum: Curriculum,
        loader: SampleLoader,
        pending: PendingState,
        depth: int,
        train_iters: int,
    ) -> None:
        """``depth``: L, the steps prepared beyond the one to be trained; 0 prepares just that one."""
        self._preparer = preparer
        self._curriculum = curriculum
        self._loader = loader
        self._pending = pending
        self._depth = depth
        self._train_iters = train_iters
        self._queue: deque[PreparedStep] = deque()
        self._before: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def num_samples(self) -> int:
        """Corpus samples of all prepared steps, over all replicas."""
        return sum(prepared.num_samples for prepared in self._queue)

    def next_step(self, step: int) -> int:
        """The first step that is not prepared; ``step``: steps done."""
        return self._queue[-1].step + 1 if self._queue else step

    def extend(self, step: int, trigger: TriggerState, save: Callable[[], None]) -> None:
        """Prepares steps up to ``step + L``; ``step``: steps done; ``save`` keeps the run's state. Collective.

        Raises:
            RunStopped: the run is to end; what was half prepared is given back to the loader.
        """
        while (ahead := self.next_step(step)) <= min(step + self._depth, self._train_iters - 1):
            with self.unfinished():
                plan = self._curriculum.plan(ahead, trigger)
                self._queue.append(self._preparer.prepare(ahead, plan, step, save))

    def head(self, step: int) -> PreparedStep:
        """The step to train on; it stays in the queue until ``done``."""
        assert self._queue[0].step == step, (self._queue[0].step, step)
        return self._queue[0]

    def done(self) -> None:
        """The head was trained on."""
        self._queue.popleft()

    @contextmanager
    def unfinished(self) -> Iterator[None]:
        """Within the block samples may be drawn that count only once it ends: a checkpoint saved in it does not have
        them, and RunStopped gives them back."""
        self._before = self._loader.state_dict()
        try:
            yield
        except RunStopped:
            self._loader.load_state_dict(self._before)
            raise
        finally:
            self._before = None

    def state_dict(self) -> dict[str, Any]:
        """The loader's state and the prepared steps, equal on all ranks, nothing of the layout. Collective."""
        return {
            "data": self._before or self._loader.state_dict(),
            "pending": [self._pending.state_of(prepared) for prepared in self._queue],
        }

    def asked_again(self, state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Steps whose verdicts a checkpoint lacks, and those that it has nothing of but may have been begun."""
        pending = state.get("pending", [])
        ahead = int(pending[-1]["step"]) + 1 if pending else int(state["step"])
        return {
            "judged_again": tuple(int(saved["step"]) for saved in pending if saved["verdicts"] is None),
            "prepared_again": tuple(range(ahead, ahead + self._depth + 1)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint: asks again what had not been answered. Collective.

        Raises:
            ConfigurationError: the prepared steps cannot be shared by this number of replicas.
        """
        self._loader.load_state_dict(state["data"])
        self._queue.clear()
        # Checkpoints of earlier versions have none.
        for saved in state.get("pending", []):
            if saved["step"] < self._train_iters:
                self._queue.append(self._pending.restored(saved))
