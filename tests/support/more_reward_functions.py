"""A reward function with a name that another module uses as well."""


def shortness(response, problem):
    return 0.5
