"""vpci._vfu is built where libvfio-user is, and only there; what does not fit is said by name. Needs no library."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import SetupError

import cffi_build
from tests.doubles import environment
from tests.vfu import fake
from vpci.guest import doctor


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the variable nor pkg-config knows a library; paths are relative to the root, as in a build."""
    monkeypatch.delenv("VPCI_LIBVFIO_USER", raising=False)
    monkeypatch.setenv("PKG_CONFIG_LIBDIR", str(tmp_path))
    monkeypatch.delenv("PKG_CONFIG_PATH", raising=False)
    monkeypatch.chdir(cffi_build.ROOT)


def build_command(*extensions: str) -> cffi_build.BuildExt:
    """The build's own command, ready to run, for these extensions and the one that it adds by itself."""
    modules = [Extension(name, []) for name in extensions]
    return cffi_build.BuildExt(Distribution({"name": "vpci", "ext_modules": modules}))


def extensions_of_a_build() -> list[str]:
    command = build_command("vpci._core")
    command.finalize_options()
    return [extension.name for extension in command.distribution.ext_modules]


def check(prefix: Path, folder: Path) -> None:
    """What a build does before it compiles vpci._vfu against `prefix`."""
    found = cffi_build.find_libvfio_user()
    assert found is not None
    generated = folder / "generated.c"
    cffi_build.vfu_ffi_builder(found).emit_c_code(str(generated))
    cffi_build.check_fit(found, generated, ["gcc"])


@pytest.fixture
def misfit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """misfit(header, functions that the library lacks): what the build says."""

    def misfit(header: str = "", without: tuple[str, ...] = ()) -> str:
        prefix = fake.install(tmp_path / "prefix", header, without)
        monkeypatch.setenv("VPCI_LIBVFIO_USER", str(prefix))
        with pytest.raises(SetupError) as error:
            check(prefix, tmp_path)
        return str(error.value)

    return misfit


def test_without_the_library_the_build_is_that_of_the_core_alone():
    assert cffi_build.find_libvfio_user() is None
    assert extensions_of_a_build() == ["vpci._core"]


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("VPCI_LIBVFIO_USER", "")
    assert extensions_of_a_build() == ["vpci._core"]


@pytest.mark.parametrize("libdir", ["lib", "lib64", "lib/x86_64-linux-gnu"])
def test_a_prefix_with_the_library_adds_the_binding(monkeypatch, tmp_path, libdir):
    prefix = fake.install(tmp_path / "prefix")
    (prefix / "lib").rename(prefix / "moved")
    (prefix / libdir).parent.mkdir(exist_ok=True)
    (prefix / "moved").rename(prefix / libdir)
    monkeypatch.setenv("VPCI_LIBVFIO_USER", str(prefix))
    assert extensions_of_a_build() == ["vpci._core", "vpci._vfu"]


def test_pkg_config_is_asked(monkeypatch, tmp_path):
    prefix = fake.install(tmp_path / "prefix")
    script = tmp_path / "pkg-config"
    answers = f"--variable=includedir) echo {prefix}/include;; --variable=libdir) echo {prefix}/lib;;"
    script.write_text(f"#!/bin/sh\n[ $2 = libvfio-user ] && case $1 in {answers} esac\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert extensions_of_a_build() == ["vpci._core", "vpci._vfu"]


@pytest.mark.parametrize("missing", ["include/vfio-user/libvfio-user.h", "lib/libvfio-user.so"])
def test_a_prefix_without_the_library_fails_the_build_and_is_named(monkeypatch, tmp_path, missing):
    prefix = fake.install(tmp_path / "prefix")
    (prefix / missing).unlink()
    monkeypatch.setenv("VPCI_LIBVFIO_USER", str(prefix))
    command = [sys.executable, "cffi_build.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: VPCI_LIBVFIO_USER={prefix}: {prefix / missing} is missing" in done.stderr


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """prefix -> vpci._vfu built against it: two libraries, one after the other in the same build folder."""
    folder = tmp_path_factory.mktemp("builds")
    found = {}
    for minor in (77, 78):
        prefix = fake.install(folder / str(minor), fake.header({**fake.VALUES, "LIB_VFIO_USER_MINOR": minor}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VPCI_LIBVFIO_USER", str(prefix))
            patch.chdir(cffi_build.ROOT)
            command = build_command()
            command.build_lib, command.build_temp = str(folder), str(folder / "temp")
            command.ensure_finalized()
            command.run()
        (extension,) = (folder / "vpci").glob("_vfu.*.so")
        found[prefix] = extension.rename(prefix / extension.name)
        shutil.copy2(found[prefix], extension)
    return found


def test_what_fits_is_built_and_has_the_header_s_values(builds):
    """The second time too: the build of the first must not be taken for it."""
    for prefix, extension in builds.items():
        assert asked(extension, "lib.LIB_VFIO_USER_MINOR") == prefix.name
        assert asked(extension, "lib.vfu_run_ctx(ffi.NULL)") == "0"
        assert asked(extension, f"open('/proc/self/maps').read().count('{prefix}/lib')") != "0"


def asked(extension: Path, expression: str, before: str = "") -> str:
    """What a fresh interpreter makes of an expression with `ffi` and `lib` of this extension, which is vpci's there."""
    load = "spec = u.spec_from_file_location('vpci._vfu', sys.argv[1]); m = u.module_from_spec(spec)"
    code = f"import sys, importlib.util as u\n{load}; ffi, lib = m.ffi, m.lib; sys.modules['vpci._vfu'] = m\n{before}\n"
    command = [sys.executable, "-c", f"{code}print({expression})", str(extension)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout.strip()


def test_the_python_side_loads_on_it_and_tells_an_error(builds):
    """All of it that can be seen without the library: the fake one makes no context."""
    use = "import vpci.pyvfio_user as p\ntry: p.Context('/nowhere')\nexcept p.VfuError as e: said = e"
    told = "vfu_create_ctx: a socket path that can be made, not '/nowhere'"
    for extension in builds.values():
        assert asked(extension, "f'{said.call}: {said.wanted}'", use) == told


def test_a_function_that_the_header_lacks_is_named(misfit):
    header = fake.header().replace("vfu_irq_trigger(", "vfu_irq_trigger_all(")
    said = misfit(header)
    assert "libvfio-user.h does not fit vpci._vfu: vfu_irq_trigger\n" in said
    assert "implicit declaration" in said


def test_a_function_with_other_arguments_is_named(misfit):
    header = fake.header().replace("vfu_run_ctx(vfu_ctx_t *ctx)", "vfu_run_ctx(vfu_ctx_t *ctx, int budget)")
    assert "does not fit vpci._vfu: vfu_run_ctx\n" in misfit(header)


def test_a_constant_that_the_header_lacks_is_named(misfit):
    header = fake.header().replace("#define VFU_SGL_DIRECT_ACCESS 0\n", "")
    assert "does not fit vpci._vfu: VFU_SGL_DIRECT_ACCESS\n" in misfit(header)


def test_a_field_that_a_struct_lacks_is_named_with_the_struct(misfit):
    assert "does not fit vpci._vfu: vfu_dma_info_t.page_size\n" in misfit(
        fake.header().replace("    size_t page_size;\n", "")
    )


def test_another_version_of_the_migration_callbacks_is_told(misfit):
    assert "are not version 2" in misfit(fake.header({"VFU_MIGR_CALLBACKS_VERS": 3}))


def test_a_library_older_than_its_header_is_told(misfit):
    said = misfit(without=("vfu_create_ioeventfd", "dma_sg_size"))
    assert said.endswith("libvfio-user.so has no dma_sg_size, vfu_create_ioeventfd, which its header declares")


def test_a_library_that_does_not_load_is_told(monkeypatch, tmp_path):
    prefix = fake.install(tmp_path / "prefix")
    (prefix / "lib/libvfio-user.so").write_bytes(bytes(4096))
    monkeypatch.setenv("VPCI_LIBVFIO_USER", str(prefix))
    with pytest.raises(SetupError, match=r"libvfio-user.so cannot be loaded: "):
        check(prefix, tmp_path)


def doctor_s_line() -> doctor.Check:
    (line,) = doctor._transports()
    return line


def test_doctor_says_how_to_get_what_is_missing(monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    line = doctor_s_line()
    assert (line.name, line.ok, line.found) == ("vpci._vfu", False, "missing")
    assert "docs/libvfio-user.md" in line.hint
    assert "VPCI_LIBVFIO_USER=PREFIX" in line.hint


def test_doctor_says_why_the_binding_does_not_load(monkeypatch):
    def broken(name: str) -> None:
        raise ImportError("libvfio-user.so.0: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    line = doctor_s_line()
    assert not line.ok
    assert line.found == "does not load: libvfio-user.so.0: cannot open shared object file"


def test_doctor_does_not_fail_for_a_missing_library():
    assert not next(check for check in doctor.checks() if check.name == "vpci._vfu").needed
