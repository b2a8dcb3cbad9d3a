"""How the demo gets the emoji font: as root, with sudo, with each package manager, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from jrl.demo import font


class Machine:
    """A machine without the font; records the commands and installs what it is told to."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, programs: tuple[str, ...], root: bool
    ):
        self.commands: list[tuple[str, ...]] = []
        self.installed: set[str] = set()
        self.lists_are_there = True
        self.password_free = True
        self.broken = False
        monkeypatch.setattr(font, "CLDR_FOLDER", tmp_path)
        monkeypatch.setattr(font, "_unusable", self.unusable)
        monkeypatch.setattr(font, "_run", self.run)
        monkeypatch.setattr(font.os, "geteuid", lambda: 0 if root else 1000)
        monkeypatch.setattr(font.shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)

    def unusable(self) -> str | None:
        there = {manager.font for manager in font.MANAGERS} & self.installed
        return None if there else "no colour-emoji font is installed"

    def run(self, command: tuple[str, ...]) -> str | None:
        self.commands.append(command)
        if command == ("sudo", "-n", "true"):
            return None if self.password_free else "a password is required"
        if self.broken:
            return "`install` failed: no network"
        if command[-1] in ("update", "-Sy"):
            self.lists_are_there = True
            return None
        if not self.lists_are_there:
            return "`install` failed: unable to locate package"
        self.installed.add(command[-1])
        return None


def ensure(*, install: bool = True) -> tuple[str | None, list[str]]:
    said: list[str] = []
    return font.ensure_font(install=install, keywords=True, say=said.append), said


@pytest.mark.parametrize("program", [manager.program for manager in font.MANAGERS])
def test_root_installs_the_font(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> None:
    machine = Machine(monkeypatch, tmp_path, (program,), root=True)
    missing, said = ensure()
    assert missing is None
    manager = next(manager for manager in font.MANAGERS if manager.program == program)
    assert machine.installed == {manager.font, manager.keywords} - {None}
    assert machine.commands[0][:3] == ("env", "DEBIAN_FRONTEND=noninteractive", program)
    assert f"installing {manager.font}" in said[0]
    assert manager.keywords or "training goes on without them" in said[-1]


def test_missing_lists_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, ("apt-get",), root=True)
    machine.lists_are_there = False
    missing, said = ensure()
    assert missing is None
    assert any("fetching the package lists" in line for line in said)


def test_sudo_is_used_only_without_a_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, ("apt-get", "sudo"), root=False)
    assert ensure()[0] is None
    assert machine.commands[1][:2] == ("sudo", "-n")
    machine = Machine(monkeypatch, tmp_path, ("apt-get", "sudo"), root=False)
    machine.password_free = False
    missing, said = ensure()
    assert missing is not None
    assert (
        "sudo apt-get install -y --no-install-recommends fonts-noto-color-emoji unicode-cldr-core" in missing
    )
    assert len(machine.commands) == 1
    assert "no CLDR keywords" in said[0]


def test_what_cannot_be_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, ("apt-get",), root=True)
    machine.broken = True
    missing, _ = ensure()
    assert missing == "no colour-emoji font is installed: `install` failed: no network"
    Machine(monkeypatch, tmp_path, (), root=True)
    missing, _ = ensure()
    assert missing is not None
    assert "none of apt-get, dnf, apk, pacman is here" in missing
    machine = Machine(monkeypatch, tmp_path, ("apt-get",), root=True)
    missing, _ = ensure(install=False)
    assert missing == "no colour-emoji font is installed: --no-install was given"
    assert not machine.commands


def test_missing_keywords_alone_stop_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, ("apt-get",), root=True)
    machine.installed.add("fonts-noto-color-emoji")
    missing, said = ensure(install=False)
    assert missing is None
    assert said == ["no CLDR keywords (--no-install was given): training goes on without them"]
    assert ensure()[0] is None
    assert "unicode-cldr-core" in machine.installed


def test_the_commands_really_run() -> None:
    assert font._run(("true",)) is None
    assert (
        font._run(("sh", "-c", "echo first; echo why >&2; exit 3"))
        == "`sh -c echo first; echo why >&2; exit 3` failed: why"
    )
    assert "exit status 1" in str(font._run(("false",)))
    assert "failed" in str(font._run(("no-such-program-anywhere",)))
