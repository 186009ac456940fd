"""A private apt: asked by qemu, kernel and the build for Debian packages, hands them to apt-get and dpkg-deb.

It has its own source list, its own state and an empty status file, so apt resolves as if nothing were installed;
nothing is installed over the system and no system file changes. Standard library only: the build imports it.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vpci.guest.cache import Progress, cache_dir, item_path, published, quiet
from vpci.guest.errors import ProvisionError
from vpci.guest.loader import environment

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CODENAMES = frozenset({"bullseye", "bookworm", "trixie", "forky", "duke", "sid"})
RELEASES = CODENAMES | {"oldoldstable", "oldstable", "stable", "testing", "unstable"}
_TARGET_FIELDS = ("REPO_URI", "RELEASE", "ORIGIN", "LABEL")
_PROXY_LINE = re.compile(r'^Acquire::(?:http|https|ftp|Retries)\S* "[^"]+";$')
_URI_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+)")


@dataclass(frozen=True)
class Target:
    """One line of `apt-get indextargets`: where an index of the machine's own sources comes from."""

    uri: str
    release: str
    origin: str
    label: str


def find_mirror() -> str:
    """The Debian archive's URI: $VPCI_APT_MIRROR, else the machine's own main archive. Raises ProvisionError."""
    return os.environ.get("VPCI_APT_MIRROR") or pick_mirror(_machine_targets())


def pick_mirror(targets: Iterable[Target]) -> str:
    """The URI of Debian's main archive among `targets`; security, updates and third parties are passed over."""
    named = [target for target in targets if target.release in RELEASES]
    if not named:
        raise ProvisionError(
            "no Debian archive among this machine's apt sources (apt-get indextargets); "
            "set VPCI_APT_MIRROR to the URI of one"
        )
    return max(named, key=_likeness).uri


def _likeness(target: Target) -> tuple[bool, bool]:
    """Best first: the archive says that it is Debian's, or (lists not fetched yet) its path says so."""
    return (target.origin, target.label) == ("Debian", "Debian"), target.uri.rstrip("/").endswith("/debian")


def _machine_targets() -> list[Target]:
    line_format = "|".join(f"$({name})" for name in _TARGET_FIELDS)
    command = ["apt-get", "indextargets", "--no-release-info", "--format", line_format]
    lines = _output(command, environment()).splitlines()
    return [Target(*fields) for line in lines if len(fields := line.split("|")) == len(_TARGET_FIELDS)]


def sources_text(mirror: str, suites: Sequence[str], keyring: Path = KEYRING) -> str:
    """A one-line-style source list: the main component of each suite, signed by Debian's archive key."""
    return "".join(f"deb [signed-by={keyring}] {mirror} {suite} main\n" for suite in suites)


def config_text(folder: Path, proxies: Sequence[str] = (), as_root: bool = False) -> str:
    """An apt.conf with every path inside `folder`; apt reads it before, and here instead of, the system's.

    `proxies` are whole lines of the system's configuration that say how to reach the network.
    """
    settings = {
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": folder / "parts",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "parts",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": folder / "parts",
        "Dir::State": folder / "state",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
        "Acquire::GzipIndexes": "true",
        "Acquire::Retries": "3",
    }
    if as_root:
        settings["APT::Sandbox::User"] = "root"
    lines = [f'{name} "{value}";' for name, value in settings.items()]
    return "\n".join([*lines, 'APT::Architectures { "amd64"; };', *proxies, ""])


class PrivateApt:
    """An apt of our own for some suites, in a folder of its own.

    `update` once, then ask. All methods raise ProvisionError with apt's own words.
    """

    def __init__(self, folder: Path, suites: Sequence[str], progress: Progress = quiet) -> None:
        self.folder = folder
        self.suites = suites
        self.progress = progress
        self._env = {**environment(), "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C.UTF-8"}

    def update(self) -> None:
        """Write the configuration and fetch the lists."""
        self._check_tools()
        mirror = find_mirror()
        for name in ("lists/partial", "cache/archives/partial", "state", "parts"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        (self.folder / "sources.list").write_text(sources_text(mirror, self.suites))
        (self.folder / "apt.conf").write_text(config_text(self.folder, _proxy_lines(), os.geteuid() == 0))
        self.progress(f"reading the package lists of {', '.join(self.suites)}")
        self._read_lists()

    def _read_lists(self) -> None:
        """Fetch the lists; those of a mirror that stands still (a snapshot) are taken too, signed but expired."""
        command = ["apt-get", "-qq", "--error-on=any", "update"]
        try:
            _output(command, self._env)
        except ProvisionError as error:
            if " is expired " not in str(error):
                raise
            self.progress("the mirror's lists are signed but past their date: taken all the same")
            _output([*command, "-o", "Acquire::Check-Valid-Until=false"], self._env)

    def depends(self, package: str) -> list[str]:
        """The names that `package` depends on, as apt writes them."""
        text = _output(["apt-cache", "depends", "--important", package], self._env)
        return re.findall(r"^\s*\|?(?:Pre)?Depends: (\S+)", text, re.MULTILINE)

    def version(self, package: str) -> str:
        """The candidate version of `package`."""
        found = re.search(r"^Version: (\S+)", _output(["apt-cache", "show", package], self._env), re.MULTILINE)
        if not found:
            raise ProvisionError(f"apt-cache show {package}: no version in {', '.join(self.suites)}")
        return found[1]

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Exactly these packages, as .deb files."""
        return self._fetch("download", packages, self.folder / "cache")

    def download_closure(self, packages: Sequence[str], suite: str) -> list[Path]:
        """These packages (from `suite`) and all that they depend on, as .deb files."""
        options = ["--download-only", "--no-install-recommends", "-t", suite, "install"]
        return self._fetch(options, packages, self.folder / "cache/archives")

    def _fetch(self, how: str | list[str], packages: Sequence[str], where: Path) -> list[Path]:
        verb = [how] if isinstance(how, str) else how
        command = ["apt-get", "-y", "-q", *verb, *packages]
        listing = _output([*command, "--print-uris"], self._env)
        sizes = {found["file"]: int(found["size"]) for line in listing.splitlines() if (found := _URI_LINE.match(line))}
        self._run_with_progress(command, where, sum(sizes.values()), packages[0])
        return self._arrived(where, sizes)

    def _arrived(self, where: Path, sizes: dict[str, int]) -> list[Path]:
        files = [where / name for name in sizes]
        missing = [path.name for path in files if not path.exists()]
        if missing or not files:
            raise ProvisionError(f"apt-get brought no {', '.join(missing) or 'package'} into {where}")
        return files

    def _run_with_progress(self, command: list[str], where: Path, total: int, name: str) -> None:
        """Run apt-get in `where`; while it downloads, say once a second how much of `total` bytes is there."""
        self.progress(f"downloading {name} ({_mb(total)})")
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                command, cwd=where, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                self._watch(process, where, total, name)
            finally:
                process.kill()
                process.wait()
            if process.returncode:
                log.seek(0)
                raise _apt_failed(command, log.read().decode(errors="replace"))

    def _watch(self, process: "subprocess.Popen[bytes]", where: Path, total: int, name: str) -> None:
        said = time.monotonic()
        while process.poll() is None:
            time.sleep(0.05)
            if time.monotonic() - said >= 1:
                said = time.monotonic()
                self.progress(f"downloading {name}: {_mb(_bytes_in(where))} of {_mb(total)}")

    def _check_tools(self) -> None:
        missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(tool)]
        if missing:
            raise ProvisionError(f"{', '.join(missing)} not found: only a Debian-like machine can fetch packages")
        if not KEYRING.exists():
            raise ProvisionError(f"{KEYRING} is missing; apt-get install debian-archive-keyring")


@contextmanager
def private_apt(suites: Sequence[str], progress: Progress = quiet) -> Iterator[PrivateApt]:
    """An updated private apt whose folder is gone afterwards. Call it with the cache's lock held."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmp-apt-", dir=cache_dir()) as name:
        apt = PrivateApt(Path(name), suites, progress)
        apt.update()
        yield apt


def unpack(debs: Iterable[Path], into: Path, progress: Progress = quiet) -> Path:
    """Unpack .deb files over one another into the folder `into`; no maintainer script runs."""
    into.mkdir(parents=True, exist_ok=True)
    files = list(debs)
    progress(f"unpacking {len(files)} packages")
    for deb in files:
        _output(["dpkg-deb", "--extract", str(deb), str(into)], environment())
    return into


def python_headers(version: str, progress: Progress = quiet) -> list[Path]:
    """The include folders that hold Python.h of `version` ("3.11"), fetched into the cache when missing.

    Two folders: Debian's pyconfig.h includes the one of the machine's triplet. Raises ProvisionError.
    """

    def make(folder: Path) -> None:
        with private_apt([debian_codename()], progress) as apt:
            root = unpack(apt.download([f"libpython{version}-dev"]), apt.folder / "root", progress)
            (root / "usr/include").rename(folder / "include")

    include = published(f"python-headers/{version}", make, progress) / "include"
    return [include / f"python{version}", include]


def cached_python_headers(version: str) -> list[Path] | None:
    """What `python_headers` brought earlier; None when it did not."""
    include = item_path(f"python-headers/{version}") / "include"
    return [include / f"python{version}", include] if include.is_dir() else None


def debian_codename() -> str:
    found = re.search(r'^VERSION_CODENAME="?(\w+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    if not found or found[1] not in CODENAMES:
        raise ProvisionError("/etc/os-release names no Debian release: Python.h cannot be fetched, install python3-dev")
    return found[1]


def _proxy_lines() -> list[str]:
    lines = _output(["apt-config", "dump"], environment()).splitlines()
    return [line for line in lines if _PROXY_LINE.match(line)]


def _output(command: list[str], env: dict[str, str]) -> str:
    try:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ProvisionError(f"{command[0]} not found: only a Debian-like machine can fetch packages") from error
    if done.returncode:
        raise _apt_failed(command, done.stdout + done.stderr)
    return done.stdout


def _apt_failed(command: list[str], output: str) -> ProvisionError:
    lines = [line for line in output.splitlines() if line.startswith(("E:", "W:", "Err:", "dpkg"))]
    said = "\n  ".join(lines or output.splitlines()[-5:])
    return ProvisionError(f"{' '.join(command[:8])} failed:\n  {said}")


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.deb*") if path.is_file())


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
