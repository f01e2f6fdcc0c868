"""How the tools' ``--help`` looks."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description as it is written; after an option's help its default in brackets, where that says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "[" in text or "default" in text or default in (None, False, "", argparse.SUPPRESS) or default in ([], ()):
            return text
        words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} [{words.replace('%', '%%')}]"
