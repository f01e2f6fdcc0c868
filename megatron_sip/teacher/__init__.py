"""Judges and rewriter in a process of their own.

Kept free of imports that need torch, for the sake of that process: what converts from and to ``megatron_sip.types`` is
in ``megatron_sip.teacher.convert``.
"""

from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.interfaces import JudgeRequest, JudgeResult, RewriteRequest, RewriteResult
from megatron_sip.teacher.process import TeacherProcess

__all__ = ["JudgeRequest", "JudgeResult", "RewriteRequest", "RewriteResult", "TeacherConfig", "TeacherProcess"]
