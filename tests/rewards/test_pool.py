"""Tests the grader pool with real processes. A worker that hangs, dies, or misbehaves affects only its own verdict."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from support import hostile_graders
from support.commands import REPOSITORY
from trapo_jax.rewards import GraderPool, grade_math
from trapo_jax.types import Problem, Verdict

PATIENT = {"num_workers": 1, "timeout_secs": 60.0}  # a limit that only infinite loops exceed
HASTY = {"num_workers": 1, "timeout_secs": 2.0}


def problem(answer="42", source="a source"):
    return Problem("id", (1, 2), answer, source=source)


def judge(pool, text, answer="42"):
    return pool.submit(text, problem(answer)).result().verdict


@pytest.fixture(scope="module")
def patient():
    with GraderPool(hostile_graders.verify, **PATIENT) as pool:
        yield pool


@pytest.fixture(scope="module")
def hasty():
    with GraderPool(hostile_graders.verify, **HASTY) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("text", ["hang", "hold the GIL", "ignore signals"])
def test_a_grader_that_never_returns_gives_a_timeout_verdict(hasty, text):
    assert judge(hasty, text) is Verdict.TIMEOUT
    assert judge(hasty, "42") is Verdict.CORRECT


@pytest.mark.parametrize("text", ["raise", "die", "exit", "fill memory", "recurse", "no verdict"])
def test_a_grader_that_fails_gives_an_error_verdict(patient, text):
    assert judge(patient, text) is Verdict.ERROR
    assert judge(patient, "42") is Verdict.CORRECT


def test_printed_output_is_not_a_verdict(patient):
    assert judge(patient, "print") is Verdict.WRONG


def test_an_idle_worker_that_is_killed_is_replaced(patient):
    assert judge(patient, "42") is Verdict.CORRECT
    for _ in range(2):
        (pid,) = children_of(os.getpid(), 'hostile_graders:verify"] 60.0')
        os.kill(pid, signal.SIGKILL)
        while is_running(pid):
            time.sleep(0.01)
        assert judge(patient, "42") is Verdict.CORRECT


def test_a_failure_is_logged_once_with_the_first_line_of_its_message(caplog):
    with GraderPool(hostile_graders.verify, **PATIENT) as pool:
        for text in ("raise", "raise again", "raise"):
            judgment = pool.submit(text, problem()).result()
            assert judgment.reason == f"ValueError: \\x1b[31mno {text}"
    (line,) = caplog.messages
    assert line == ("reward function support.hostile_graders:verify: ValueError: \\x1b[31mno raise")


def test_a_long_message_is_truncated_and_a_message_that_cannot_be_shown_is_omitted(patient):
    reason = patient.submit("raise at length", problem()).result().reason
    assert len(reason) == 200
    assert reason.isprintable()
    assert patient.submit("raise silently", problem()).result().reason == "SilentError"


def test_a_timeout_names_the_field_that_sets_it(caplog):
    with GraderPool(hostile_graders.verify, num_workers=1, timeout_secs=0.5) as pool:
        assert pool.submit("hang", problem()).result().reason == Verdict.TIMEOUT
    assert caplog.messages == [
        "reward function support.hostile_graders:verify: timeout (rewards.timeout_secs)"
    ]


@pytest.mark.slow
def test_hostile_texts_do_not_change_other_verdicts(hasty):
    """Hostile and harmless strings are interleaved and submitted at once; there are more strings than workers."""
    texts = ["42", "hang", "7", "die", "42", "raise", "hold the GIL", "7", "42"]
    verdicts = [f.result().verdict for f in [hasty.submit(text, problem()) for text in texts]]
    c, w, e, t = Verdict.CORRECT, Verdict.WRONG, Verdict.ERROR, Verdict.TIMEOUT
    assert verdicts == [c, t, w, e, c, e, t, w, c]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\x1b[2J\r\n\u2028",
        "\ud800 lone \udfff",
        "\u202eright to left",
        "\U0001f600",
        '"}\n{"',
    ],
)
def test_any_string_is_received_unchanged(text):
    with GraderPool(hostile_graders.same_text, **PATIENT) as pool:
        assert judge(pool, text, text) is Verdict.CORRECT


def test_only_the_end_of_a_long_text_is_graded():
    with GraderPool(hostile_graders.length_is, max_response_chars=1000, **PATIENT) as pool:
        assert judge(pool, "x" * 10**7, "1000") is Verdict.CORRECT
        assert judge(pool, "x" * 999, "999") is Verdict.CORRECT
    with GraderPool(grade_math, max_response_chars=1000, **PATIENT) as pool:
        assert judge(pool, "x" * 10**7 + r"\boxed{42}") is Verdict.CORRECT
        assert judge(pool, r"\boxed{42}" + "x" * 10**7) is Verdict.WRONG


@pytest.mark.parametrize("module", ["jax", "jaxlib", "flax", "transformers", "torch"])
def test_a_worker_imports_no_heavy_packages(module):
    with GraderPool(hostile_graders.has_module, **PATIENT) as pool:
        assert judge(pool, module) is Verdict.WRONG
        assert judge(pool, "trapo_jax.rewards") is Verdict.CORRECT


def test_a_worker_does_not_import_the_main_module_again(tmp_path):
    """The main module of `python -m trapo_jax.train`, for example, imports JAX."""
    (tmp_path / "main_of_a_run.py").write_text(
        "import jax\n"
        "from support import hostile_graders\n"
        "from trapo_jax.rewards import GraderPool\n"
        "from trapo_jax.types import Problem\n"
        "with GraderPool(hostile_graders.has_module) as pool:\n"
        "    print(pool.submit('jax', Problem('', (), '')).result().verdict)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY), str(REPOSITORY / "tests")])
    result = subprocess.run(
        [sys.executable, "-m", "main_of_a_run"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.stdout.strip() == "wrong", result.stderr


def test_no_secret_reaches_a_worker(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws_secret")
    monkeypatch.setenv("LANG", "C.UTF-8")
    with GraderPool(hostile_graders.has_variable, **PATIENT) as pool:
        for text in ("hf_secret", "HF_TOKEN", "aws_secret", "AWS_"):
            assert judge(pool, text) is Verdict.WRONG
        assert judge(pool, "LANG=C.UTF-8") is Verdict.CORRECT


def test_workers_exit_when_the_pool_is_closed():
    with GraderPool(hostile_graders.verify, num_workers=2, timeout_secs=61.0) as pool:
        assert judge(pool, "42") is Verdict.CORRECT
        assert len(children_of(os.getpid(), 'hostile_graders:verify"] 61.0')) == 2
    assert not children_of(os.getpid(), 'hostile_graders:verify"] 61.0')
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("42", problem())


@pytest.mark.slow
def test_a_busy_worker_exits_if_its_trainer_is_killed():
    script = (
        "import sys, time\n"
        "from support import hostile_graders\n"
        "from trapo_jax.rewards import GraderPool\n"
        "from trapo_jax.types import Problem\n"
        "pool = GraderPool(hostile_graders.verify, num_workers=1, timeout_secs=1.5)\n"
        "pool.submit('42', Problem('', (), '')).result()\n"
        "pool.submit('hold the GIL', Problem('', (), ''))\n"
        "time.sleep(0.5)\n"  # the worker is busy
        "print(flush=True)\n"
        "time.sleep(100)\n"
    )
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment
    ) as trainer:
        trainer.stdout.readline()
        workers = children_of(trainer.pid, "hostile_graders:verify")
        trainer.kill()
    assert len(workers) == 1
    while is_running(workers[0]):  # pytest-timeout ends the test if this takes forever
        time.sleep(0.05)


def test_close_cancels_pending_grades():
    pool = GraderPool(hostile_graders.verify, **HASTY)
    futures = [pool.submit("hang", problem()) for _ in range(50)]
    pool.close()
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) >= 48


def test_a_grader_that_cannot_be_imported_gives_an_error_verdict(tmp_path, monkeypatch, caplog):
    (tmp_path / "fleeting.py").write_text("def verify(text, problem): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import fleeting

    (tmp_path / "fleeting.py").unlink()
    with GraderPool(fleeting.verify, **PATIENT) as pool:
        assert judge(pool, "42") is Verdict.ERROR
    assert "fleeting" in caplog.text


def test_a_function_without_an_importable_name_is_rejected():
    with pytest.raises(ValueError, match="top level"):
        GraderPool(lambda text, problem: Verdict.CORRECT)


HOSTILE_MATH = {
    "tower": r"\boxed{9**9**9**9}",
    "latex tower": r"\boxed{9^{9^{9^{9}}}}",
    "big power": r"\boxed{10^{10^8}}",
    "factorial tower": r"\boxed{((9!)!)!}",
    "20k braces": r"\boxed{" + "{" * 20_000 + "1" + "}" * 20_000 + "}",
    "900 braces": r"\boxed{" + "{" * 900 + "1" + "}" * 900 + "}",
    "300 fractions": r"\boxed{" + r"\frac{1}{" * 150 + "1" + "}" * 150 + "}",
    "open braces": r"\boxed{" * 20_000,
    "power of a sum": r"\boxed{(x+1)^{5000}}",
    "sum of powers": r"\boxed{\sum_{k=1}^{10^9} \frac{1}{k^k}}",
    "10 MB": "x" * 10**7,
    "10 MB boxed": r"\boxed{" + "1" * 10**7 + "}",
    "control characters": "\x00\x1b[31m\x07" + r"\boxed{4" + "\x00\x08" + "2}",
    "lone surrogates": r"\boxed{" + "\ud800\udfff" + "}",
    "other digits": r"\boxed{" + "\u0664\u0662 \uff14\uff12" + "}",
    "right to left": r"\boxed{" + "\u202e24}",
    "code": r"\boxed{__import__('os').system('kill -9 0')}",
    "matrix": r"\boxed{\begin{pmatrix}" + r"1&" * 900 + r"1\end{pmatrix}}",
    "matrix of 200 x 200": r"\boxed{\begin{pmatrix}"
    + ("1&" * 199 + r"1\\") * 200
    + r"\end{pmatrix}}",
    "blanks": "answer" + " " * 90_000 + "\n" * 9_000 + "####" + " " * 900,
}


class Heartbeat:
    """Measures the longest time during which no other thread of this process could run."""

    def __enter__(self):
        self.longest, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()
        return self

    def _beat(self):
        last = time.monotonic()
        while not self._stop.wait(0.01):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


@pytest.mark.slow
def test_20_hostile_answers_among_200_affect_only_their_own_verdicts():
    """All responses are submitted at once, like the last rollouts of a step. The time limit applies to each of them."""
    hostile = list(HOSTILE_MATH.values())
    assert len(hostile) == 20
    rng = random.Random(0)
    texts = [
        (rf"so \boxed{{{n}}}", n == 42) for n in (rng.choice((40, 41, 42)) for _ in range(180))
    ]
    for text in hostile:
        texts.insert(rng.randrange(len(texts) + 1), (text, None))
    with (
        GraderPool(grade_math, num_workers=2, timeout_secs=3.0) as pool,
        Heartbeat() as heartbeat,
    ):
        longest_call = 0.0
        futures = []
        for text, _ in texts:
            started = time.monotonic()
            futures.append(pool.submit(text, problem()))
            longest_call = max(longest_call, time.monotonic() - started)
        verdicts = [future.result().verdict for future in futures]
        # The kernel enforces this memory limit on all workers, including those that replace killed workers. The loop
        # waits until the replacements are running.
        limits = set()
        while limits != {(2 * 2**30, 2 * 2**30)}:
            time.sleep(0.05)
            workers = children_of(os.getpid(), "trapo_jax.rewards.worker")
            limits = {resource.prlimit(worker, resource.RLIMIT_AS) for worker in workers}
    for verdict, (text, is_right) in zip(verdicts, texts, strict=True):
        if is_right is None:
            assert verdict is not Verdict.CORRECT, text[:80]
        else:
            assert verdict is (Verdict.CORRECT if is_right else Verdict.WRONG), text
    assert Verdict.TIMEOUT in verdicts
    assert heartbeat.longest < 1.0
    assert longest_call < 1.0


def children_of(parent, part_of_command):
    """Returns the ids of a process's children whose command line contains `part_of_command`."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split(None, 3) for line in listing.stdout.splitlines()]
    return [
        int(row[0])
        for row in rows
        if int(row[1]) == parent and row[2][0] != "Z" and part_of_command in row[-1]
    ]


def is_running(pid):
    """Returns whether a process exists and has not terminated; zombies have terminated."""
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(listing.stdout.strip()) and listing.stdout.strip()[0] != "Z"


def test_a_process_that_the_system_cannot_start_raises_an_error_in_the_caller(monkeypatch):
    """If the reward were missing instead, the results would depend on the machine's load."""

    def fail(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with GraderPool(hostile_graders.verify, **PATIENT) as pool:
        with pytest.raises(OSError, match="a grading process"):
            judge(pool, "42")
        monkeypatch.undo()
        assert judge(pool, "42") is Verdict.CORRECT
