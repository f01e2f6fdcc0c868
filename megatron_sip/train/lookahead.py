"""Steps that are prepared ahead: with lookahead L, batch t + L is generated and submitted before training on t.

Where rewrites are asked for, samples are drawn another R steps ahead: rewrites need no weights, so that they are never
stale, and the work of whole steps hides the rewriter. What is drawn or prepared will be trained on: nothing is drawn
beyond the last step, a phase that a probe opens begins with the first step that has no plan yet, and all of it is part
of a checkpoint (``train.pending``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_sip.curriculum import Curriculum, TriggerState
from megatron_sip.data.loader import SampleLoader
from megatron_sip.train.pending import PendingState
from megatron_sip.train.prepare import DrawnStep, PreparedStep, Preparer
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
        draw_ahead: int = 0,
    ) -> None:
        """``depth``: L, the steps prepared beyond the one to be trained; 0 prepares just that one. ``draw_ahead``: R,
        steps drawn beyond the one that is prepared."""
        self._preparer = preparer
        self._curriculum = curriculum
        self._loader = loader
        self._pending = pending
        self._depth = depth
        self._train_iters = train_iters
        self._draw_ahead = draw_ahead
        self._drawn: deque[DrawnStep] = deque()
        self._queue: deque[PreparedStep] = deque()
        self._before: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def num_samples(self) -> int:
        """Corpus samples of all steps that are drawn, prepared or not, over all replicas."""
        return sum(step.num_samples for step in self._queue) + sum(step.num_samples for step in self._drawn)

    def next_step(self, step: int) -> int:
        """The first step that has no plan; ``step``: steps done."""
        planned = self._drawn or self._queue
        return planned[-1].step + 1 if planned else step

    def extend(self, step: int, trigger: TriggerState, save: Callable[[], None]) -> None:
        """Prepares steps up to ``step + L``; ``step``: steps done; ``save`` keeps the run's state. Collective.

        Raises:
            RunStopped: the run is to end; what was drawn for it stays drawn.
        """
        last = min(step + self._depth, self._train_iters - 1)
        prepared = self._queue[-1].step if self._queue else step - 1
        for ahead in range(prepared + 1, last + 1):
            self._draw_up_to(min(ahead + self._draw_ahead, self._train_iters - 1), step, trigger)
            self._queue.append(self._preparer.prepare(self._drawn[0], step, save))
            self._drawn.popleft()

    def _draw_up_to(self, last: int, step: int, trigger: TriggerState) -> None:
        while (ahead := self.next_step(step)) <= last:
            self._drawn.append(self._preparer.draw(ahead, self._curriculum.plan(ahead, trigger)))

    def head(self, step: int) -> PreparedStep:
        """The step to train on; it stays in the queue until ``done``."""
        assert self._queue[0].step == step, (self._queue[0].step, step)
        return self._queue[0]

    def done(self) -> None:
        """The head was trained on."""
        self._queue.popleft()

    @contextmanager
    def unfinished(self) -> Iterator[None]:
        """Within the block a step is trained on, and may draw samples (``train.fill``) that count only once it ends: a
        checkpoint saved in it does not have them, and RunStopped gives them back."""
        self._before = self._loader.state_dict()
        try:
            yield
        except RunStopped:
            self._loader.load_state_dict(self._before)
            raise
        finally:
            self._before = None

    def state_dict(self) -> dict[str, Any]:
        """The loader's state, prepared and drawn steps; equal on all ranks, nothing of the layout. Collective."""
        return {
            "data": self._before or self._loader.state_dict(),
            "pending": [self._pending.state_of(prepared) for prepared in self._queue],
            "drawn": [self._pending.drawn_state(drawn) for drawn in self._drawn],
        }

    def asked_again(self, state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Steps whose verdicts a checkpoint lacks, and those that it has nothing of but may have been begun."""
        pending = state.get("pending", [])
        ahead = int(pending[-1]["step"]) + 1 if pending else int(state["step"])
        return {
            "judged_again": tuple(int(saved["step"]) for saved in pending if saved["verdicts"] is None),
            "prepared_again": tuple(range(ahead, ahead + self._depth + self._draw_ahead + 1)),
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
        self._drawn.clear()
        for saved in state.get("drawn", []):
            if saved["step"] < self._train_iters:
                self._drawn.append(self._pending.drawn_again(saved))
