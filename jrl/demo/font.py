"""The colour-emoji font: found, installed with the system's package manager, or missing for a stated reason."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jrl.data.emoji import CLDR_FOLDER
from jrl.data.emoji_font import EmojiPainter, find_emoji_font

Say = Callable[[str], None]
Command = tuple[str, ...]


@dataclass(frozen=True)
class PackageManager:
    """How a package manager installs, and what it calls the font and the CLDR keywords.

    Attributes:
        program: its name.
        install: arguments before the name of a package.
        refresh: arguments that fetch its lists, which a fresh container lacks; none when it does so itself.
        font: package of Noto Color Emoji.
        keywords: package of the CLDR annotations; none when no package of it is known.
    """

    program: str
    install: Command
    font: str
    keywords: str | None = None
    refresh: Command | None = None


MANAGERS = (
    PackageManager(
        "apt-get",
        ("install", "-y", "--no-install-recommends"),
        "fonts-noto-color-emoji",
        "unicode-cldr-core",
        ("update",),
    ),
    PackageManager("dnf", ("install", "-y"), "google-noto-color-emoji-fonts", "cldr-emoji-annotation"),
    PackageManager("apk", ("add",), "font-noto-emoji", refresh=("update",)),
    PackageManager("pacman", ("-S", "--noconfirm", "--needed"), "noto-fonts-emoji", refresh=("-Sy",)),
)
# seconds: a slow mirror is waited for, a package manager that hangs on a lock is not
_PATIENCE = 240
_FONT, _KEYWORDS = "font", "keywords"


def ensure_font(*, install: bool, keywords: bool, say: Say) -> str | None:
    """Make sure that the emoji can be drawn; install the font, and the CLDR keywords, when they are missing.

    Args:
        install: whether installing is allowed.
        keywords: whether the keywords are wanted too; without them training has fewer words, and goes on.
        say: takes each line of what is done.

    Returns:
        None when the font is there, else why it is not and what would help.
    """
    missing = _unusable()
    wanted = [_FONT] if missing is not None else []
    if keywords and not (CLDR_FOLDER / "annotations" / "en.xml").is_file():
        wanted.append(_KEYWORDS)
    if not wanted:
        return None
    failures = _obtain(wanted, say) if install else dict.fromkeys(wanted, "--no-install was given")
    if failures.get(_KEYWORDS):
        say(f"no CLDR keywords ({failures[_KEYWORDS]}): training goes on without them")
    if missing is None:
        return None
    missing = _unusable()
    return missing and f"{missing}: {failures.get(_FONT) or 'installing it did not help'}"


def _obtain(wanted: Sequence[str], say: Say) -> dict[str, str | None]:
    """Install each thing wanted; returns why not, for each that could not be."""
    manager = next((manager for manager in MANAGERS if shutil.which(manager.program)), None)
    if manager is None:
        known = ", ".join(manager.program for manager in MANAGERS)
        return dict.fromkeys(wanted, f"none of {known} is here to install it")
    packages = {name: getattr(manager, name) for name in wanted}
    prefix = _privilege()
    if prefix is None:
        names = [package for package in packages.values() if package]
        command = " ".join(["sudo", manager.program, *manager.install, *names])
        return dict.fromkeys(wanted, f"installing needs root, or sudo without a password: {command}")
    return {
        name: _install(manager, package, prefix, say)
        if package
        else f"{manager.program}: no package is known"
        for name, package in packages.items()
    }


def _unusable() -> str | None:
    try:
        EmojiPainter(find_emoji_font())
    except FileNotFoundError:
        return "no colour-emoji font is installed"
    except ValueError as error:
        return f"the installed colour-emoji font cannot be drawn ({error})"
    return None


def _privilege() -> Command | None:
    """What goes before a command that needs root: nothing for root itself, sudo where it asks no password."""
    if os.geteuid() == 0:
        return ()
    if shutil.which("sudo") and _run(("sudo", "-n", "true")) is None:
        return ("sudo", "-n")
    return None


def _install(manager: PackageManager, package: str, prefix: Command, say: Say) -> str | None:
    """Install one package; returns why that failed."""
    # sudo drops the environment, `env` sets it behind sudo
    program = (*prefix, "env", "DEBIAN_FRONTEND=noninteractive", manager.program)
    command = (*program, *manager.install, package)
    say(f"installing {package}: {' '.join(command)}")
    failure = _run(command)
    if failure is not None and manager.refresh is not None:
        refresh = (*program, *manager.refresh)
        say(f"fetching the package lists first: {' '.join(refresh)}")
        failure = _run(refresh) or _run(command)
    return failure


def _run(command: Sequence[str]) -> str | None:
    """Run a command in silence; returns why it failed."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{' '.join(command)}` failed: {error}"
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return f"`{' '.join(command)}` failed: {lines[-1] if lines else f'exit status {done.returncode}'}"
