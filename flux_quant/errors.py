"""The one exception type for what a user can cause. The command line prints it as one line and exits with 2."""


class UserError(ValueError):
    """Wrong input: a file, an option, a combination. The message is one line with the numbers and the remedy."""
