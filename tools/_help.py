"""How the tools' ``--help`` looks, and what is said of a flag that is none."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_sip.config.suggest import did_you_mean


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description as it is written; after an option's help its default in brackets, where that says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "[" in text or "default" in text or default in (None, False, "", argparse.SUPPRESS) or default in ([], ()):
            return text
        words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} [{words.replace('%', '%%')}]"


class Parser(argparse.ArgumentParser):
    """Bad input is answered in one line, an unknown flag with the name that was probably meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse, but an unknown flag is said before one that is missing: it may be the same one."""
        words = list(sys.argv[1:] if args is None else args)
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in flags):
                self.error(f"unknown flag {name}{did_you_mean(name, flags)}")
        return super().parse_args(words, namespace)
