"""What is raised for a mistake that the user can mend?"""


class GmaskError(ValueError):
    """A user's mistake, told in one line that says what to do; the command line prints it and exits with 2."""


def one_line(error: Exception) -> str:
    """The start of another library's message; of torch's, of what stands behind its advice."""
    return " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:160] or type(error).__name__
