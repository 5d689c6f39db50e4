"""Contains chat templates that are used by import path."""


def without_prompt(prompt):
    return "Solve the problem."
