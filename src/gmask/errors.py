"""What is raised for a mistake that the user can mend?"""


class GmaskError(ValueError):
    """A user's mistake, told in one line that says what to do; the command line prints it and exits with 2."""
