"""Defines a reward function that has the same name as a function in another module."""


def shortness(response, problem):
    return 0.5
