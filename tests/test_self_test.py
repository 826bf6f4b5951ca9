"""The self-test as a whole: what it runs, survives, reports and leaves out."""

import getpass
import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import typer

from conftest import refused, run
from mlx_openelm.commands import self_test as command, tables
from mlx_openelm.errors import ConfigError, MemoryLimitError
from mlx_openelm.machine import device, doctor
from mlx_openelm.machine.device import choices
from mlx_openelm.self_test import runner, suite
from mlx_openelm.self_test.check import Check, Comparison, Outcome, Skip, judged
from mlx_openelm.self_test.open_choices import OPEN_CHOICES
from mlx_openelm.self_test.reference import on_reference
from mlx_openelm.self_test.report import anonymous
from mlx_openelm.self_test.runner import run_checks
from mlx_openelm.self_test.session import Extent, Session


def passing(session):
    return Outcome("passed", "fine")


def raising(error):
    def check(session):
        raise error

    return check


def statuses(report):
    return {row.name: row.outcome.status for row in report.rows}


class TestComparison:
    def test_is_relative_to_the_largest_value(self):
        found = Comparison.of("x", mx.array([1.0, -8.0]), mx.array([1.0, -10.0]), 0.1)
        assert (found.difference, found.share) == (pytest.approx(0.2), pytest.approx(2))

    def test_what_is_not_finite_differs(self):
        assert Comparison.of("x", mx.array([float("nan")]), mx.array([1.0]), 0.1).difference == float("inf")

    @pytest.mark.parametrize("expected", [[0.0], [float("inf")], [float("nan")], [1.0, 2.0]])
    def test_nothing_to_compare_with_is_an_error(self, expected):
        with pytest.raises(ValueError, match="x: "):
            Comparison.of("x", mx.array([0.0]), mx.array(expected), 0.1)

    def test_the_worst_one_decides(self):
        fine, bad = Comparison("fine", 0.5, 1.0), Comparison("bad", 0.2, 0.1)
        found = judged([fine, bad], "do this")
        assert (found.status, found.advice, found.allowed) == ("failed", "do this", "1.0e-01")
        assert "bad" in found.found
        assert judged([fine], "do this").advice == ""


class TestRunner:
    def test_a_check_that_raises_has_failed_and_the_others_go_on(self):
        checks = [Check("first", raising(RuntimeError("no such\nkernel"))), Check("second", passing)]
        report = run_checks(checks, Session(Extent()))
        assert statuses(report) == {"first": "failed", "second": "passed"}
        assert report.rows[0].outcome.found == "RuntimeError: no such kernel"
        assert (report.has_failed, report.is_complete) == (True, True)

    def test_an_error_says_where_in_the_package_it_came_from(self):
        report = run_checks([Check("x", lambda session: session.tolerance(mx.int32))], Session(Extent()))
        (row,) = report.rows
        assert re.search(r"^self_test/session.py:\d+ in tolerance$", row.outcome.figures["at"][-1])

    @pytest.mark.parametrize("reason", [Skip("no GPU"), MemoryLimitError(5, 2**40, 2**30)])
    def test_what_does_not_apply_is_skipped_with_the_reason(self, reason):
        (row,) = run_checks([Check("x", raising(reason))], Session(Extent())).rows
        assert (row.outcome.status, row.outcome.found) == ("skipped", str(reason))

    def test_no_measurement_begins_when_the_time_is_used_up(self):
        checks = [Check("right?", passing), Check("fast?", passing, is_optional=True)]
        assert statuses(run_checks(checks, Session(Extent(seconds=0)))) == {"right?": "passed", "fast?": "skipped"}
        assert statuses(run_checks(checks, Session(Extent(seconds=60)))) == {"right?": "passed", "fast?": "passed"}

    def test_ctrl_c_leaves_what_there_is(self):
        checks = [Check("a", passing), Check("b", raising(KeyboardInterrupt)), Check("c", passing)]
        report = run_checks(checks, Session(Extent()))
        assert statuses(report) == {"a": "passed"}
        assert (report.running, report.is_interrupted, report.is_complete) == ("b", True, False)

    def test_it_tells_which_check_runs(self):
        heard = []
        checks = [Check("a", passing), Check("b", passing)]
        run_checks(checks, Session(Extent()), lambda report: heard.append((len(report.rows), report.running)))
        assert heard == [(0, "a"), (1, "b")]


class TestReference:
    def test_is_the_plain_cpu_within_and_nothing_of_it_stays(self, monkeypatch):
        before = mx.default_device(), choices()
        monkeypatch.setattr(device, "_from_environment", lambda: {"fused_kernels": True, "tokens_first": True})
        with pytest.raises(ZeroDivisionError), on_reference():
            assert choices() == device._DEFAULTS["cpu"]
            assert mx.default_device() == mx.Device(mx.cpu)
            _ = 1 / 0
        monkeypatch.undo()
        assert (mx.default_device(), choices()) == before


def test_every_choice_that_is_marked_as_open_is_measured():
    source = Path(device.__file__).read_text(encoding="utf-8")
    assert set(OPEN_CHOICES) == set(re.findall(r"^    (\w+): .*# open: ", source, re.MULTILINE))


def test_names_of_checks_are_unique_and_select_them():
    checks = suite.all_checks(Extent())
    names = [check.name for check in checks]
    assert len(names) == len(set(names)) > 40
    assert [check.name for check in suite.selected(checks, ["fused kernels", "LoRA"])] == [
        "fused kernels",
        "LoRA step on 4 bits as the CPU's",
    ]
    assert suite.selected(checks, []) == checks
    with pytest.raises(ConfigError, match="no check has 'nonsense'"):
        suite.selected(checks, ["LoRA", "nonsense"])


def test_tf32_widens_what_is_allowed_in_float32_only():
    exact, tf32 = Session(Extent()), Session(Extent())
    exact.has_exact_products, tf32.has_exact_products = True, False
    assert tf32.tolerance(mx.float32) > exact.tolerance(mx.float32)
    assert tf32.tolerance(mx.bfloat16) == exact.tolerance(mx.bfloat16)


class TestPersonalData:
    @pytest.fixture
    def owner(self, monkeypatch, tmp_path):
        home = tmp_path / "zaphod-b"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setattr(doctor, "blas_in_use", lambda: home / "lib" / "libheart.so")
        monkeypatch.setenv("OPENELM_MLX_CHOICES", "")
        monkeypatch.setenv("MLX_ENABLE_TF32", f"0 {home}")
        monkeypatch.setattr(getpass, "getuser", lambda: "zaphod")
        monkeypatch.setattr(platform, "node", lambda: "heart-of-gold.local")
        return home

    def test_the_json_has_none(self, owner, monkeypatch):
        monkeypatch.chdir(owner)
        told = f"cannot open {owner}/secret plans/x.bin on heart-of-gold for zaphod (~/y.bin)"
        checks = [Check("x", raising(OSError(told))), Check("y", lambda session: Outcome("passed", told, told))]
        text = run_checks(checks, Session(Extent())).to_json()
        for personal in ("zaphod", "heart-of-gold", str(owner), str(owner.parent), "secret", "/tmp"):
            assert personal not in text, personal
        machine = json.loads(text)["machine"]
        assert machine["blas"] == "libheart.so"
        assert machine["environment"] == {}
        assert {"chip", "device", "memory_bytes", "system", "versions", "choices"} <= machine.keys()

    def test_what_is_no_path_stays(self):
        assert anonymous("12 tokens/s, 3/4 of 2.5 GB/s", []) == "12 tokens/s, 3/4 of 2.5 GB/s"
        assert anonymous("'/a/b c.txt' and /d/e/f.so: no", []) == "'b c.txt' and f.so: no"
        assert anonymous("ann sees annual plans", ["ann"]) == "*** sees annual plans"


class TestCommand:
    @pytest.fixture
    def printed(self, tmp_path, monkeypatch, capsys):
        """Runs these checks in this process; gives the status, what is printed, and the file's content."""

        def with_checks(*checks, **options):
            monkeypatch.setattr(suite, "all_checks", lambda extent: list(checks))
            options = {"only": [], "output": tmp_path / "found.json", "force": False, "as_json": False, **options}
            status = 0
            try:
                command.run_self_test(**options)
            except typer.Exit as done:
                status = done.exit_code
            return status, capsys.readouterr().out, json.loads(options["output"].read_text())

        return with_checks

    def test_in_a_narrow_terminal_what_was_found_has_a_line_of_its_own(self, printed, monkeypatch):
        monkeypatch.setattr(command, "is_terminal", lambda stream: True)
        monkeypatch.setenv("COLUMNS", "80")
        compared = Check("one", lambda session: Outcome("passed", "differs by 1.0e-06 " + "of a word " * 9, "1.0e-04"))
        _, out, _ = printed(compared)
        lines = out.splitlines()
        assert re.fullmatch(r"one +passed +0.0", lines[2])
        assert lines[3].startswith("  differs by 1.0e-06 of a word")
        assert lines[4].endswith("; allowed: 1.0e-04")
        assert all(len(line) <= 80 for line in lines[:5])

    def test_in_a_very_narrow_terminal_all_but_the_name_has(self, printed, monkeypatch):
        monkeypatch.setattr(command, "is_terminal", lambda stream: True)
        monkeypatch.setattr(tables, "is_terminal", lambda stream: True)
        monkeypatch.setenv("COLUMNS", "40")
        compared = Check("a check with a name", lambda session: Outcome("passed", "differs by 1.0e-06", "1.0e-04"))
        _, out, _ = printed(compared)
        assert out.splitlines()[:5] == [
            "check",
            "  status, seconds, found",
            "a check with a name",
            "  passed in 0.0 s, differs by 1.0e-06,",
            "  allowed: 1.0e-04",
        ]
        assert all(len(line) <= 40 or "/" in line for line in out.splitlines())

    def test_prints_a_table_and_writes_a_file(self, printed):
        status, out, found = printed(Check("one", passing), Check("two", raising(Skip("no GPU"))))
        assert status == 0
        assert re.search(r"^check +found +allowed +status +seconds\none +fine +passed +0.0\ntwo +no GPU +skipped", out)
        assert "attach it to an issue" in out
        assert found["counts"] == {"passed": 1, "skipped": 1}
        assert [check["check"] for check in found["checks"]] == ["one", "two"]
        assert found["is_complete"]

    def test_a_failure_is_status_1_and_named(self, printed):
        status, out, found = printed(Check("one", raising(ValueError("x"))), Check("two", passing))
        assert (status, found["counts"]) == (1, {"failed": 1, "passed": 1})
        assert "please report it. Failed: one" in out

    def test_ctrl_c_is_status_130_and_keeps_what_there_is(self, printed):
        status, _, found = printed(Check("one", passing), Check("two", raising(KeyboardInterrupt)))
        assert (status, found["counts"], found["running"]) == (130, {"passed": 1}, "two")
        assert not found["is_complete"]

    def test_the_file_names_the_check_that_runs_if_the_process_ends(self, printed, tmp_path):
        seen = []

        def look(session):
            seen.append(json.loads((tmp_path / "found.json").read_text()))
            return Outcome("passed", "fine")

        printed(Check("one", passing), Check("two", look))
        assert (seen[0]["running"], seen[0]["counts"], seen[0]["is_complete"]) == ("two", {"passed": 1}, False)

    def test_advice_is_printed_once(self, printed):
        advised = replace(passing(None), advice="set X=1")
        _, out, _ = printed(*(Check(name, lambda session: advised) for name in "ab"))
        assert out.count("* set X=1\n") == 1

    def test_json_alone(self, printed):
        _, out, found = printed(Check("one", passing), as_json=True)
        assert json.loads(out) == found

    def test_as_people_type_it(self, tmp_path):
        words = ["doctor", "--self-test", "--only", "stored logits, float32", "-o", tmp_path / "found.json"]
        status, out, err = run(*words)
        assert (status, err) == (0, "")
        assert re.search(r"stored logits, float32 +differs by [\d.e+-]+ \(float32\) +1.0e-04 +passed", out)
        assert json.loads((tmp_path / "found.json").read_text())["counts"] == {"passed": 1}
        assert "--force" in refused(*words)
        assert run(*words, "--force")[0] == 0

    def test_mistakes(self, tmp_path):
        assert "--only: no check has 'nonsense'" in refused("doctor", "--self-test", "--only", "nonsense")
        assert "require --self-test" in refused("doctor", "-o", tmp_path / "x.json")
        assert list(tmp_path.iterdir()) == []


def test_a_runner_keeps_few_frames_of_an_endless_recursion():
    def endless(session):
        return judged([Comparison.of("x", mx.array([1.0]), mx.array([1.0]), 1.0)]) and endless(session)

    (row,) = run_checks([Check("x", endless)], Session(Extent())).rows
    assert row.outcome.found.startswith("RecursionError")
    assert len(row.outcome.figures["at"]) <= runner._DEEPEST
