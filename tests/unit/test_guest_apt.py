"""What the private apt is told: mirror, sources and configuration as text; nothing is fetched here."""

import subprocess
from pathlib import Path

import pytest

from vpci.guest import apt
from vpci.guest.apt import Target, config_text, pick_mirror, sources_text
from vpci.guest.errors import ProvisionError

MAIN = Target("http://a/debian/", "bookworm", "Debian", "Debian")
SECURITY = Target("http://a/debian-security/", "bookworm-security", "Debian", "Debian-Security")
UPDATES = Target("http://a/debian/", "bookworm-updates", "Debian", "Debian")
OTHER = Target("http://b/apt/", "bookworm", "Somebody", "Somebody")
UNREAD = "$(ORIGIN)"


def test_the_mirror_is_debians_main_archive() -> None:
    assert pick_mirror([OTHER, SECURITY, UPDATES, MAIN]) == MAIN.uri


def test_the_mirror_is_found_before_any_list_was_fetched() -> None:
    fresh = [Target(target.uri, target.release, UNREAD, UNREAD) for target in (OTHER, SECURITY, MAIN)]
    assert pick_mirror(fresh) == MAIN.uri


def test_a_machine_without_debian_is_told_what_to_set() -> None:
    with pytest.raises(ProvisionError, match="VPCI_APT_MIRROR"):
        pick_mirror([SECURITY, Target("http://c/ubuntu/", "noble", "Ubuntu", "Ubuntu")])


def test_a_named_mirror_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPCI_APT_MIRROR", "http://mine/")
    assert apt.find_mirror() == "http://mine/"


def test_every_suite_is_signed_by_debians_key() -> None:
    assert sources_text("http://a/debian", ["trixie", "sid"]) == (
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://a/debian trixie main\n"
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://a/debian sid main\n"
    )


def test_apt_writes_nowhere_but_into_its_folder(tmp_path: Path) -> None:
    lines = config_text(tmp_path).splitlines()
    paths = {line.split()[0]: line.split('"')[1] for line in lines if line.startswith("Dir::")}
    assert {name for name, path in paths.items() if not path.startswith(str(tmp_path))} == {
        "Dir::Etc::main",
        "Dir::Etc::preferences",
    }
    assert paths["Dir::State::status"] == f"{tmp_path}/status"


def test_only_root_leaves_apts_sandbox(tmp_path: Path) -> None:
    assert "Sandbox" in config_text(tmp_path, as_root=True)
    assert "Sandbox" not in config_text(tmp_path, as_root=False)


def test_the_machines_proxy_is_kept(tmp_path: Path) -> None:
    proxy = 'Acquire::http::Proxy "http://proxy:3128";'
    assert proxy in config_text(tmp_path, [proxy]).splitlines()


def test_what_is_preloaded_for_us_is_not_for_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sanitizer's library has hung apt's gpgv."""
    monkeypatch.setenv("LD_PRELOAD", "ours.so")
    given = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> object:
        given.append(env)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("VPCI_APT_MIRROR", "http://mirror/debian")
    monkeypatch.setattr(apt.subprocess, "run", run)
    apt.PrivateApt(tmp_path, ["sid"]).update()
    apt.unpack([tmp_path / "a.deb"], tmp_path)
    assert given
    assert all("LD_PRELOAD" not in env for env in given)
