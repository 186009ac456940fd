# The binding to libvfio-user (cffi_build.py makes it from csrc/vfu/*.h, where the library is): mypy sees it as foreign.
from typing import Any

ffi: Any
lib: Any
