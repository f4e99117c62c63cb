"""The one exception that a user can cause: its message is one line saying what is wrong, where, and what to do."""


class UserError(Exception):
    """Wrong input, configuration or files; the command line prints the message alone and exits with code 2."""
