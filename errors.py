"""What a user can mend: one base class, so that a script's end needs to know one name. Every message is one line."""


class UserError(ValueError):
    """Something that cannot be used; the message names it, its value and the cure."""


class ConfigError(UserError):
    """A setting."""


class DataError(UserError):
    """A data folder, or the text that is to become one."""


class ModelError(UserError):
    """A configuration of a model, a model directory, or an input of a model."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or continued."""


class HubError(UserError):
    """The hub that refuses a repository or an upload."""


class TrainError(UserError):
    """A run that cannot go on."""


def first_line(error: BaseException) -> str:
    """What a library said, without its traceback or advice: the first line that is not empty, else the error's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
