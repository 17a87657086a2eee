"""Errors that are the user's to mend."""


class UserError(Exception):
    """Bad input or configuration, said in one line: what was found, where, and what was expected.

    Jobs print it and exit with status 2. Anything else that is raised is a defect of ours.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class StorageError(UserError):
    """Storage that refuses or cannot be reached: the user's to mend before a run starts; while it goes on, a reason to
    try again."""


class RunFailed(Exception):
    """A run that was started as asked and could not be completed, said in one line. Jobs exit with status 1."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
