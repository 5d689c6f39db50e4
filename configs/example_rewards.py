r"""Defines two reward functions to copy. They work with any config in this folder:

    python -m trapo_jax.train --config configs/qwen3_4b_openr1.yaml \
        'rewards.functions=[math, example_rewards:boxed, example_rewards:brevity]' 'rewards.weights=[8, 1, 1]'

A reward function takes the text of the response and its problem (`answer`, `prompt_text`, `source`), and, as keyword
arguments, the columns listed in `data.columns.extra`. It returns a number from 0 to 1, or True or False.
"""

import re


def boxed(response, problem):
    r"""Format reward: returns whether the response has exactly one `\boxed{...}`, in its last 200 characters."""
    return response.count(r"\boxed{") == 1 and bool(re.search(r"\\boxed\{", response[-200:]))


def brevity(response, problem, limit=8_000):
    """Length reward: returns 1 for an empty response, falling linearly to 0 at `limit` characters."""
    return max(0.0, 1.0 - len(response) / limit)
