"""Defines reward functions that misbehave in the way that the response specifies. This module does not import JAX."""

import os
import signal
import sys
import time

from trapo_jax.types import Problem, Verdict


class SilentError(Exception):
    def __str__(self):
        raise RuntimeError


def verify(response_text: str, problem: Problem) -> Verdict:
    """Misbehaves as specified by the response, or compares the response with the answer."""
    match response_text:
        case "hang":
            return sum(1 for _ in iter(int, 1))
        case "hold the GIL":
            return 9**9**9
        case "ignore signals":
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
            time.sleep(1e6)
        case "raise" | "raise again":
            raise ValueError(f"\x1b[31mno {response_text}\nsuch text")
        case "raise at length":
            raise ValueError("\x00\u202e" * 10_000)
        case "raise silently":
            raise SilentError
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
    """Returns CORRECT if the module named by the text has been imported."""
    return Verdict.CORRECT if response_text in sys.modules else Verdict.WRONG


def has_variable(response_text: str, problem: Problem) -> Verdict:
    """Returns CORRECT if the current or the initial environment contains the text."""
    with open("/proc/self/environ", "rb") as file:
        initial = file.read().decode(errors="replace")
    current = "".join(f"{name}={value};" for name, value in os.environ.items())
    return Verdict.CORRECT if response_text in initial + current else Verdict.WRONG


def length_is(response_text: str, problem: Problem) -> Verdict:
    """Returns CORRECT if the length of the received text equals the answer."""
    return Verdict.CORRECT if len(response_text) == int(problem.answer) else Verdict.WRONG


def same_text(response_text: str, problem: Problem) -> Verdict:
    """Returns CORRECT if the response and the problem's id and source are received unchanged."""
    same = response_text == problem.answer and (problem.id, problem.source) == ("id", "a source")
    return Verdict.CORRECT if same else Verdict.WRONG
