"""pyvfio_user without libvfio-user: what it says. Needs no library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cffi_build
import vpci
from tests.doubles import environment
from tests.vfu import example

MODULE = Path(vpci.__file__).parent / "pyvfio_user.py"


def test_without_the_binding_the_import_says_how_to_get_it():
    code = "import sys; sys.modules['vpci._vfu'] = None; import vpci.pyvfio_user"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: vpci._vfu is not here")
    assert "https://github.com/nutanix/libvfio-user" in said
    assert "VPCI_LIBVFIO_USER=PREFIX" in said


def test_every_function_of_the_library_is_used():
    """The binding declares nothing that the Python side leaves out."""
    text = MODULE.read_text()
    unused = {name for name in cffi_build.library_functions() if not re.search(rf"\b{name}\b", text)}
    assert unused == set()


def test_the_page_says_where_each_function_is_and_every_name_on_it_exists():
    page = example.PAGE.read_text().split("## Which function is where")[1]
    theirs = set(re.findall(r"`((?:vfu|dma)_\w+)`", page))
    assert theirs == cffi_build.library_functions()
    ours = {name for name in re.findall(r"`(?:ScatterList\.)?([a-z_]+)`", page) if name not in theirs}
    assert ours <= set(re.findall(r"def (\w+)\(", MODULE.read_text()))
