"""Step -> what to train on: phases, ramps and a trigger. Pure."""

from megatron_sip.curriculum.config import CurriculumConfig, Phase, Trigger
from megatron_sip.curriculum.curriculum import Curriculum, StepPlan, TriggerState

__all__ = ["Curriculum", "CurriculumConfig", "Phase", "StepPlan", "Trigger", "TriggerState"]
