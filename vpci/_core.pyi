# The compiled border (cffi_build.py makes it from csrc/api/*.h): mypy sees it as foreign.
from typing import Any

ffi: Any
lib: Any
