"""The one error type that a command shows to its user as a single line."""


class UserError(Exception):
    """Something the user can mend: the message says what, where, and what to do, in one line."""
