"""The five ways in which a run can fail for a reason that its user can mend.

Every message names the value that was found and the remedy. Anything else that is raised is a defect of ours.
"""


class SIPError(Exception):
    """Base class: entry points print these as one line, without a traceback."""


class ConfigurationError(SIPError):
    """A flag, a recipe or a combination of them that cannot work. One line, whatever the values that it quotes hold."""

    def __init__(self, message: str) -> None:
        super().__init__("\\n".join(message.splitlines()))


class DataError(SIPError):
    """A corpus, an index or a tokenizer that is broken, empty or does not fit the others."""


class JudgeError(SIPError):
    """The teacher process died, or more of its calls failed than the run allows."""


class CheckpointError(SIPError):
    """A checkpoint that is missing, half written or of another model."""


class RolloutError(SIPError):
    """A rollout server cannot be reached, does not fit the run, or did not answer after all attempts."""
