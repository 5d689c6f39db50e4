"""Defines reward functions as users might write them, including some that fail. This module does not import JAX."""

import asyncio
import os
import time

NESTED = lambda response, problem: 1.0


def shortness(response, problem):
    return 1 - len(response) / 100


def crash_on_7(response, problem):
    if "7" in response:
        os.abort()
    return True


def difficulty(response, problem, difficulty):
    return difficulty


def any_column(response, problem, **columns):
    return columns == {"hint": "h", "level": 3} and problem.prompt_text == "What is it?"


async def asynchronous(response, problem):
    await asyncio.sleep(0.001)
    return response == problem.answer


def needs_numpy(response, problem):
    import numpy as np

    return float(np.mean([0, 1]))


def returns_text(response, problem):
    return "splendid"


def raises(response, problem):
    raise ValueError("no")


def sleeps(response, problem):
    time.sleep(1e6)


def sees_tokens(response, problem):
    return True, ",".join(name for name in ("JUDGE_TOKEN", "OTHER_TOKEN") if name in os.environ)
