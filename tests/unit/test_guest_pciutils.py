"""Which lspci is taken: the machine's, the cache's with its own loader, or none; nothing here touches the network."""

from __future__ import annotations

import pytest

from vpci.guest import pciutils


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPCI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(pciutils, "_PLACES", ())
    return tmp_path


def test_without_one_there_is_none():
    assert pciutils.find_lspci() is None


def test_the_machines_comes_first(cache):
    (cache / "cache/pciutils").mkdir(parents=True)
    (cache / "bin").mkdir()
    program = cache / "bin/lspci"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert pciutils.find_lspci() == pciutils.ensure_lspci() == [str(program)]


def test_the_caches_runs_through_its_own_loader(cache):
    folder = cache / "cache/pciutils"
    folder.mkdir(parents=True)
    assert pciutils.find_lspci() == [f"{folder}/ld-linux-x86-64.so.2", "--library-path", str(folder), f"{folder}/lspci"]
