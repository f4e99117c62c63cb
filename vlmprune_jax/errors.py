"""Exceptions whose message is one line for the user: what happened, where, and what to do."""


class UserError(Exception):
    """Wrong input, configuration or files; the command line prints the message alone and exits with code 2."""


class Stopped(UserError):
    """Work ended on SIGTERM where it could; the same call continues it."""


class SharedError(UserError):
    """Raised on every process of a run at once: none has to tell the others."""
