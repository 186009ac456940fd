"""Which libnbd is taken: the system's, the cache's, or none; nothing here touches the network."""

from __future__ import annotations

import pytest

from vpci.guest import ProvisionError, libnbd, loader


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, on a machine of a known release without libnbd."""
    monkeypatch.setenv("VPCI_CACHE", str(tmp_path))
    monkeypatch.setattr(libnbd, "debian_codename", lambda: "bookworm")
    monkeypatch.setattr(libnbd, "SONAME", "libnbd-that-nobody-has.so.0")
    return tmp_path / "libnbd-bookworm"


def test_without_one_there_is_none():
    assert libnbd.find_libnbd() is None


def test_the_systems_is_taken_by_its_name(monkeypatch):
    monkeypatch.setattr(libnbd, "SONAME", "libc.so.6")
    assert libnbd.find_libnbd() == "libc.so.6"


def test_the_caches_is_taken_by_its_path_when_all_of_it_can_be_loaded(cache, monkeypatch):
    cache.mkdir()
    (cache / "libneeded.so.1").write_bytes(b"")
    (cache / libnbd.SONAME).write_bytes(b"")
    tried = []

    def loads(library):
        """The second one loads only after the first."""
        tried.append(str(library))
        return str(library).endswith("libneeded.so.1") or (
            str(cache / "libneeded.so.1") in tried[:-1] and "/" in str(library)
        )

    monkeypatch.setattr(libnbd, "_loads", loads)
    assert libnbd.find_libnbd() == str(cache / libnbd.SONAME)


def test_one_that_cannot_be_loaded_is_named(cache):
    cache.mkdir()
    (cache / libnbd.SONAME).write_bytes(b"not a library")
    with pytest.raises(ProvisionError, match=r"libnbd-that-nobody-has\.so\.0 of .*bookworm cannot be loaded"):
        libnbd.find_libnbd()


def test_on_a_machine_that_is_no_debian_the_cache_has_none(monkeypatch):
    def codename():
        raise ProvisionError("no Debian")

    monkeypatch.setattr(libnbd, "debian_codename", codename)
    assert libnbd.find_libnbd() is None


def test_parts_of_libc_are_left_where_they_are(tmp_path, monkeypatch):
    """A second libc in one process would be the end of it."""
    root = tmp_path / "root"
    listing = "".join(f"\t{name} => {root}/lib/{name} (0x1)\n" for name in ("libc.so.6", "libm.so.6", "libxml2.so.2"))
    monkeypatch.setattr(loader.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": listing}))
    assert set(libnbd._libraries(root)) == {libnbd.SONAME, "libxml2.so.2"}
