"""A libvfio-user that is not one: a prefix with the header that vpci._vfu is written for, and functions that do nothing.

The header is made from vpci's own declarations, so these tests need no library; parts of it can be left out.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

import cffi_build

#: What our declarations leave to the library's header and our C file relies on.
CALLBACK_TYPES = """
typedef void (vfu_log_fn_t)(vfu_ctx_t *ctx, int level, const char *msg);
typedef ssize_t (vfu_region_access_cb_t)(vfu_ctx_t *ctx, char *buf, size_t count, loff_t offset, bool is_write);
typedef void (vfu_dev_irq_state_cb_t)(vfu_ctx_t *ctx, uint32_t start, uint32_t count, bool mask);
typedef int (vfu_reset_cb_t)(vfu_ctx_t *ctx, vfu_reset_type_t type);
typedef int (vfu_device_quiesce_cb_t)(vfu_ctx_t *ctx);
typedef void (vfu_dma_register_cb_t)(vfu_ctx_t *ctx, vfu_dma_info_t *info);
typedef void (vfu_dma_unregister_cb_t)(vfu_ctx_t *ctx, vfu_dma_info_t *info);
typedef struct {
    int version;
    int (*transition)(vfu_ctx_t *ctx, vfu_migr_state_t state);
    ssize_t (*read_data)(vfu_ctx_t *ctx, void *buf, uint64_t count);
    ssize_t (*write_data)(vfu_ctx_t *ctx, void *buf, uint64_t count);
} vfu_migration_callbacks_t;
"""
VALUES = {"VFU_MIGR_CALLBACKS_VERS": 2}
INCLUDES = "#include <stdbool.h>\n#include <stdint.h>\n#include <sys/types.h>\n#include <sys/uio.h>\n"


def header(values: Mapping[str, int] = VALUES) -> str:
    """A C header that declares what vpci/csrc/vfu/libvfio_user.h expects of the library's."""
    text = (cffi_build.ROOT / cffi_build.CSRC / f"{cffi_build.VFU_LIBRARY_API}.h").read_text()
    callbacks = set(re.findall(r"typedef [^;{]*\((\w+)\)", CALLBACK_TYPES)) | {"vfu_migration_callbacks_t"}
    text = re.sub(r"struct iovec \{.*\};\n", "", text)
    text = re.sub(r",\s+\.\.\.\s*\}", " }", text).replace("    ...;\n", "").replace("{ ...; }", "{ int word; }")
    text = re.sub(r"#define (\w+) \.\.\.", lambda found: f"#define {found[1]} {values.get(found[1], 0)}", text)
    text = re.sub(
        r"typedef \.\.\. (\w+);\n", lambda f: "" if f[1] in callbacks else f"typedef struct {f[1]} {f[1]};\n", text
    )
    types, functions = split(text)
    return f"{INCLUDES}{types}{CALLBACK_TYPES}{functions}"


def split(text: str) -> tuple[str, str]:
    """Types and constants, and the functions, which need them all."""
    found = re.findall(r"^(?:const )?\w+ [^;{}#]*?\([^;]*\);\n", text, re.MULTILINE)
    for function in found:
        text = text.replace(function, "")
    return text, "".join(function for function in found)


def install(prefix: Path, text: str = "", without: Collection[str] = ()) -> Path:
    """Header and library below `prefix`; functions in `without` are in the header only."""
    folder = prefix / "include" / "vfio-user"
    folder.mkdir(parents=True)
    (prefix / "lib").mkdir()
    (folder / "libvfio-user.h").write_text(text or header())
    names = sorted(cffi_build.library_functions() - set(without))
    source = prefix / "fake.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    library = prefix / "lib" / "libvfio-user.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return prefix
