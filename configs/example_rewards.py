r"""Two reward functions to copy. They work beside any config of this folder:

    python -m trapo_jax.train --config configs/qwen3_4b_openr1.yaml \
        'rewards.functions=[math, example_rewards:boxed, example_rewards:brevity]' 'rewards.weights=[8, 1, 1]'

A reward function gets the text of the response and its problem (`answer`, `prompt_text`, `source`), and the columns named
by `data.columns.extra` as keyword arguments. It returns a number from 0 to 1, or True or False.
"""

import re


def boxed(response, problem):
    r"""A format reward: whether the response has exactly one `\boxed{...}`, in its last 200 characters."""
    return response.count(r"\boxed{") == 1 and bool(re.search(r"\\boxed\{", response[-200:]))


def brevity(response, problem, limit=8_000):
    """A length reward: 1 for an empty response, falling linearly to 0 at `limit` characters."""
    return max(0.0, 1.0 - len(response) / limit)
