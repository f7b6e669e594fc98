"""What the GPU tests of all operations share."""


def relative_error(actual, truth):
    """Norm of the difference over the norm of the truth, in float64."""
    return ((actual.double() - truth.double()).norm() / truth.double().norm()).item()
