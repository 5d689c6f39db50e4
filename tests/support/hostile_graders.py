"""Functions for the reward workers of tests: the text says what goes wrong. Imports no jax."""

import os
import signal
import sys
import time

from trapo_jax.types import Problem, Verdict


def verify(response_text: str, problem: Problem) -> Verdict:
    """Does what the text says; else compares it with the answer."""
    match response_text:
        case "hang":
            return sum(1 for _ in iter(int, 1))
        case "hold the GIL":
            return 9**9**9
        case "ignore signals":
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
            time.sleep(1e6)
        case "raise":
            raise ValueError("\x1b[31mno\nsuch text")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(0)
        case "fill memory":
            return len(b"x" * 10**11)
        case "recurse":
            return verify_recursively(response_text)
        case "no verdict":
            return "yes"
        case "print":
            print('{"verdict": "correct"}', flush=True)
            os.write(1, b'{"verdict": "correct"}\n')
    return Verdict.CORRECT if response_text == problem.answer else Verdict.WRONG


def verify_recursively(text):
    return verify_recursively(text) + 1


def has_module(response_text: str, problem: Problem) -> Verdict:
    """CORRECT if the module that the text names has been imported."""
    return Verdict.CORRECT if response_text in sys.modules else Verdict.WRONG


def has_variable(response_text: str, problem: Problem) -> Verdict:
    """CORRECT if the environment, now or at the start, names the text anywhere."""
    with open("/proc/self/environ", "rb") as file:
        started_with = file.read().decode(errors="replace")
    now = "".join(f"{name}={value};" for name, value in os.environ.items())
    return Verdict.CORRECT if response_text in started_with + now else Verdict.WRONG


def length_is(response_text: str, problem: Problem) -> Verdict:
    """CORRECT if the text that arrives has as many characters as the answer says."""
    return Verdict.CORRECT if len(response_text) == int(problem.answer) else Verdict.WRONG


def same_text(response_text: str, problem: Problem) -> Verdict:
    """Judges by what came with the problem."""
    same = response_text == problem.answer and (problem.id, problem.source) == ("id", "a source")
    return Verdict.CORRECT if same else Verdict.WRONG
