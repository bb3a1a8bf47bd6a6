"""Errors that a user can act on, and the exit code of each kind.

A `UserError` is printed as a message and a hint, without a traceback; any other exception is a bug of this project.
"""

from __future__ import annotations

import unicodedata

EXIT_FAILURE = 1
EXIT_CONFIG = 3
EXIT_DATA = 4
EXIT_RESUME = 75
EXIT_INTERRUPTED = 130


def is_visible(character: str) -> bool:
    """Whether a character is visible or a space, rather than a control character, a direction mark or half a surrogate pair."""
    return character.isprintable() or unicodedata.category(character) == "Zs"


def printable(text: str) -> str:
    """Text that is safe on a terminal: invisible characters are escaped, and line breaks are kept."""
    return "".join(each if each == "\n" or is_visible(each) else each.encode("unicode_escape").decode("ascii") for each in text)


def one_line(text: str, most: int = 200) -> str:
    """`printable` on one line and cut to a length, for text from a file within a message."""
    shown = printable(text).replace("\n", "\\n")
    return shown if len(shown) <= most else f"{shown[:most]}..."


class UserError(Exception):
    """Something outside the program is wrong; `hint` says what to do about it."""

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(UserError):
    """A params file or a value in it is wrong (exit code 3)."""

    exit_code = EXIT_CONFIG


class DataError(UserError):
    """Images, manifests, stores or result files are missing, damaged or changed (exit code 4)."""

    exit_code = EXIT_DATA


class Preempted(UserError):
    """The run was asked to stop and has saved its state; running the same command resumes it (exit code 75)."""

    exit_code = EXIT_RESUME
