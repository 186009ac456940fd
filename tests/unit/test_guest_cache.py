"""The cache: an item is made once, whole or not at all."""

import threading
from pathlib import Path

import pytest

from vpci.guest.cache import cache_dir, published
from vpci.guest.errors import ProvisionError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VPCI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(folder: Path) -> None:
    (folder / "x").write_text("done")


def test_the_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VPCI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "vpci"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/u")
    assert cache_dir() == Path("/home/u/.cache/vpci")


def test_an_item_is_made_once(cache: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        fill(folder)

    assert published("a/b", make) == published("a/b", make) == cache / "a/b"
    assert len(made) == 1
    assert (cache / "a/b/x").read_text() == "done"


def test_two_at_once_make_it_once() -> None:
    made: list[int] = []
    first_is_in, go_on = threading.Event(), threading.Event()

    def make(folder: Path) -> None:
        made.append(1)
        first_is_in.set()
        go_on.wait(10)

    first = threading.Thread(target=published, args=("a", make))
    first.start()
    assert first_is_in.wait(10)
    waits: list[str] = []
    second = threading.Thread(target=published, args=("a", make, lambda text: (waits.append(text), go_on.set())))
    second.start()
    first.join(10)
    second.join(10)
    assert len(made) == 1
    assert "waiting" in waits[0]


def test_a_maker_that_fails_leaves_nothing_and_may_be_tried_again(cache: Path) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise ProvisionError("half way")

    with pytest.raises(ProvisionError, match="half way"):
        published("a", broken)
    assert [path.name for path in cache.iterdir()] == ["lock"]
    assert (published("a", fill) / "x").exists()


def test_what_a_killed_maker_left_is_swept(cache: Path) -> None:
    (cache / "tmp-old/item").mkdir(parents=True)
    published("a", fill)
    assert not (cache / "tmp-old").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VPCI_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(ProvisionError, match="VPCI_CACHE names another"):
        published("a", fill)
