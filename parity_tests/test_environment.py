"""A record names the commit of its program. Oracle: a repository of git's own."""

import shutil
import subprocess

import pytest

from parity_tests import environment


@pytest.mark.skipif(shutil.which("git") is None, reason="asks git")
def test_what_a_benchmark_writes_is_no_change_of_its_program(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert environment.environment()["commit"] is None
    program, table = tmp_path / "program.py", tmp_path / "benchmarks" / "results" / "a" / "table.md"
    table.parent.mkdir(parents=True)
    program.write_text("1")
    table.write_text("1")
    named = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*named, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    commit = environment.environment()["commit"]
    assert isinstance(commit, str)
    assert len(commit) == 12
    table.write_text("2")
    (table.parent / "record.json").write_text("{}")
    assert environment.environment()["commit"] == commit
    program.write_text("2")
    assert environment.environment()["commit"] == f"{commit}+changes"
