"""docs/RESULTS.md, written from stored experiments."""


def write(root, to):
    raise NotImplementedError
