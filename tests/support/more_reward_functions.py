"""Defines a reward function with the same name as one in another module."""


def shortness(response, problem):
    return 0.5
