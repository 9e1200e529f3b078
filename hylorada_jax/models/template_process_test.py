"""Whatever a template does, it costs one error, and the next one renders."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hylorada_jax.errors import DataError
from hylorada_jax.models import template_process
from hylorada_jax.models.template_process import Rendered, run_template

FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "nested loops": FOREVER,
    "loops that write": FOREVER.replace("{% endfor %}", "{{ 'x' * 100 }}{% endfor %}", 1),
    "a constant": "{{ 'a' * 2000000000 }}",
    "of the messages": "{{ messages[0].role * 2000000000 }}",
    "a list": "{{ messages * 2000000000 }}",
    "center": "{{ 'a'.center(3000000000) }}",
    "ljust, long": "{{ 'a'.ljust(100000000) }}",
    "format %": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "tojson": "{{ messages | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "wordwrap": "{{ ('a b ' * 10**6) | wordwrap(1, wrapstring='x' * 10**6) }}",
    "power": "{{ (3 * messages | length) ** (10**9) }}",
    "doubled": "{% set n = namespace(s=messages) %}{% for i in range(90) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "replaced": "{% set n = namespace(s='a') %}{% for i in range(90) %}"
    "{% set n.s = n.s.replace('a', 'aaaaaaaaaa') %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "raised": "{{ raise_exception('a' * 10**9) }}",
    "long chain": "{{ a" + ".b" * 100_000 + " }}",
    "day": "{{ strftime_now('%Y' * 10**9) }}",
}
REFUSED = {
    "macro for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "block for ever": "{% block a %}{{ self.a() }}{% endblock %}",
    "loop for ever": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
    "signs": "{{ " + "-" * 100_000 + "1 }}",
    "blocks": "{% if 1 %}" * 9000 + "{% endif %}" * 9000,
    "sum": "{{ 1" + " + 1" * 20_000 + " }}",
    "digits": "{{ " + "9" * 100_000 + " }}",
    "range": "{{ range(10**9) | list }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "globals": "{{ strftime_now.__globals__.x }}",
    "globals by key": "{{ raise_exception['__globals__'].x }}",
    "globals by attr": "{{ (raise_exception | attr('__globals__')).x }}",
    "globals by map": "{{ ([lipsum] | map(attribute='__globals__') | first).x }}",
    "globals by format": "{{ '{0.__globals__.x}'.format(lipsum) }}",
    "globals by format_map": "{{ '{a.__globals__.x}'.format_map({'a': lipsum}) }}",
    "globals by a stored method": "{% set f = '{0.__globals__.x}'.format %}{{ [lipsum] | map(f) | list }}",
    "globals of a class": "{{ cycler.__init__.x }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "context": "{{ self._TemplateReference__context.x }}",
    "mro": "{{ dict.mro() }}",
    "changed": "{{ messages.append(1) }}",
}


def small():
    assert run_template("{{ 1 + n }}", [{"n": 1}], seconds=20) == [Rendered("2", [])]


def expect(template, match, seconds=0.5):
    start = time.monotonic()
    (error,) = run_template(template, [{"messages": [{"role": "user", "content": "Hi"}]}], seconds)
    assert isinstance(error, DataError)
    assert re.search(match, str(error))
    assert len(str(error)) < 1000
    return time.monotonic() - start


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_much_is_ended(name):
    took = expect(
        HOSTILE[name], r"it takes (longer|more memory)|it writes [\d,]+ characters|its process dies"
    )
    assert took < 5
    small()


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_sandbox_refuses_is_our_error(name):
    expect(REFUSED[name], "chat template accepts", seconds=5)


def process_id():
    small()
    process = template_process._worker._process
    assert process is not None
    return process.pid


def test_one_process_renders_until_it_is_killed():
    first = process_id()
    assert process_id() == first
    os.kill(first, signal.SIGKILL)
    time.sleep(0.1)
    assert process_id() != first


def test_an_interrupt_leaves_no_answer_behind():
    def interrupt(*_):
        raise KeyboardInterrupt

    small()  # it runs
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_template(FOREVER, [{}], seconds=20)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert run_template("{{ 1 }}", [{}], seconds=3) == [Rendered("1", [])]


def test_one_request_that_takes_too_much_leaves_the_others_alone():
    template = "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}{{ 1 // (n - 1) }}"
    found = run_template(template, [{"n": n} for n in (2, 99999, 1, 3)], seconds=0.5)
    assert (found[0], found[3]) == (Rendered("1", []), Rendered("0", []))
    assert re.search("takes longer", str(found[1]))
    assert re.search("ZeroDivisionError", str(found[2]))


def test_requests_that_together_exceed_the_memory_are_rendered(monkeypatch):
    monkeypatch.setattr(template_process, "MEMORY", 2**27)
    template_process._worker.stop()
    requests = [{"n": "x" * 2**22}] * 32
    assert run_template("{{ n | length }}", requests, 20) == [Rendered(str(2**22), [])] * len(requests)
    template_process._worker.stop()


def test_what_generation_marks_is_told_apart_whatever_the_messages_say():
    template = (
        "{% for m in messages %}<{{ m }}>{% generation %}{{ m }}{% generation %}!{% endgeneration %}"
        "{% endgeneration %}-{% endfor %}"
    )
    messages = ["a", "\x02(", "ü😀", ""]
    (found,) = run_template(template, [{"messages": messages}], seconds=20)
    assert isinstance(found, Rendered)
    assert found.text == "".join(f"<{m}>{m}!-" for m in messages)
    assert [found.text[start:stop] for start, stop in found.generated] == [f"{m}!" for m in messages]


def test_threads_take_turns():
    texts: list[str] = []
    threads = [
        threading.Thread(
            target=lambda n=n: texts.extend(str(run_template("{{ n }}", [{"n": n}], 20)) for _ in range(20))
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(str([Rendered(str(n), [])]) for n in range(4) for _ in range(20))


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="asks Linux")
def test_the_process_has_no_environment_and_opens_no_files(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TZ", "UTC")
    template_process._worker.stop()
    process = Path(f"/proc/{process_id()}")
    names = {line.split(b"=")[0] for line in (process / "environ").read_bytes().split(b"\0") if line}
    assert {b"TZ"} <= names <= {b"TZ", b"LD_LIBRARY_PATH"}
    limits = (process / "limits").read_text()
    assert re.search(r"Max open files +0 +0 ", limits)
    assert re.search(rf"Max address space +{template_process.MEMORY} +{template_process.MEMORY} ", limits)
    assert {link.name for link in (process / "fd").iterdir()} == {"0", "1", "2"}


def test_no_module_beside_a_script_is_imported(monkeypatch, tmp_path):
    for name in ("re", "json", "html", "signal"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    template_process._worker.stop()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small()


def test_a_python_that_does_not_start_it_is_named(monkeypatch):
    template_process._worker.stop()
    for wrong in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", wrong)
        with pytest.raises(DataError, match=f"'{wrong}' does not start it"):
            run_template("x", [{}])
    monkeypatch.undo()
    small()


SCRIPT = """
import os, sys, json, time
from hylorada_jax.models import template_process
from hylorada_jax.models.template_process import run_template

def process_id():
    assert run_template("{{ 1 }}", [{}], 20)[0].text == "1"
    return template_process._worker._process.pid

ids = [process_id()]
template_process._worker._lock.acquire()  # as if another thread rendered
child = os.fork()
if child:
    template_process._worker._lock.release()
    assert os.waitpid(child, 0)[1] == 0
    ids.append(process_id())
    print(json.dumps(ids))
else:
    forked = process_id()
    assert forked != ids[0]
    print(forked, flush=True)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/stat").exists(), reason="asks Linux")
def test_a_fork_has_its_own_process_and_an_end_leaves_none():
    # Python 3.13 warns of any fork beside a thread, here of the process's timer.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    forked, ids = map(json.loads, ended.stdout.splitlines())
    assert ids[0] == ids[1]
    assert not alive(forked)
    assert not alive(ids[0])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux")
def test_a_process_whose_parent_was_killed_ends_too():
    script = (
        SCRIPT.split("ids =")[0] + f"print(process_id(), flush=True); run_template({FOREVER!r}, [{{}}], 0.5)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.communicate()
    assert alive(pid)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)
