"""The plugin that fails a run with an unlisted skip, each time in a pytest run of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PLUGIN = Path(__file__).parents[1] / "skipcheck.py"
SKIPPED = "import pytest\n@pytest.mark.skip(reason='no moon')\ndef test_moon(): pass\ndef test_sun(): pass\n"
MODULE = "import pytest\npytest.skip('no sky', allow_module_level=True)\n"


@pytest.fixture
def run(pytester: pytest.Pytester):
    """run(module text, listed ids, arguments): pytest in a process of its own, with the plugin."""
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider\n")
    pytester.makepyfile(skipcheck=PLUGIN.read_text())

    def run(text: str, listed: str = "", *arguments: str) -> pytest.RunResult:
        folder = pytester.path / "tests"
        folder.mkdir(exist_ok=True)
        (folder / "skips.txt").write_text(f"# a comment\n{listed}\n")
        (folder / "test_it.py").write_text(text)
        return pytester.runpytest_subprocess("-p", "skipcheck", *arguments)

    return run


def closing_line(result: pytest.RunResult) -> str:
    return [line for line in result.outlines if line][-1]


def test_an_unlisted_skip_fails_the_run_and_is_named(run):
    result = run(SKIPPED)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*1 skipped, 1 of them not in tests/skips.txt*", "NOT LISTED tests/test_it.py::test_moon: *", "FAILED: *"]
    )
    assert "1 passed, 1 skipped" in closing_line(result)


def test_a_listed_skip_is_shown_with_its_reason_and_fails_nothing(run):
    result = run(SKIPPED, "tests/test_it.py::test_moon")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*1 skipped, 0 of them not in*", "skipped tests/test_it.py::test_moon: *no moon"])
    result.stdout.no_fnmatch_line("FAILED: *")


def test_a_listed_test_that_did_not_run_or_passed_fails_nothing(run):
    listed = "tests/test_it.py::test_moon\ntests/test_it.py::test_sun\ntests/test_gone.py"
    assert run(SKIPPED, listed, "-k", "sun").ret == pytest.ExitCode.OK


def test_an_unlisted_skip_fails_a_run_of_a_few_tests_too(run):
    assert run(SKIPPED, "", "-k", "moon").ret == pytest.ExitCode.TESTS_FAILED


def test_a_skip_in_the_middle_of_a_test_counts(run):
    assert run("import pytest\ndef test_moon(): pytest.skip('no moon')\n").ret == pytest.ExitCode.TESTS_FAILED


def test_a_skip_by_a_fixture_counts(run):
    text = "import pytest\n@pytest.fixture\ndef moon(): pytest.skip('no moon')\ndef test_moon(moon): pass\n"
    assert run(text).ret == pytest.ExitCode.TESTS_FAILED


def test_a_skipped_module_counts_under_its_own_id(run):
    result = run(MODULE)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["NOT LISTED tests/test_it.py: *no sky"])


def test_an_expected_failure_counts(run):
    result = run("import pytest\n@pytest.mark.xfail(reason='no moon')\ndef test_moon(): assert 0\n")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["NOT LISTED *::test_moon: xfail: no moon"])


def test_a_run_without_skips_says_so(run):
    result = run("def test_sun(): pass\n")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*0 skipped, 0 of them not in tests/skips.txt*"])


def test_a_failure_stays_a_failure(run):
    assert run("def test_sun(): assert 0\n").ret == pytest.ExitCode.TESTS_FAILED


def test_this_run_has_the_plugin(request: pytest.FixtureRequest):
    """tests/conftest.py loads it, whichever folder pytest was started for."""
    assert request.config.pluginmanager.has_plugin("skipcheck-of-this-run")
    assert "tests.skipcheck" in sys.modules
