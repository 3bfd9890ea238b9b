"""The exceptions effc raises. One line each: what was found, what is allowed, what to do."""


class EffcError(Exception):
    """Base of everything effc raises on purpose; `status` is the command's exit status."""

    status = 1


class BadInput(EffcError):
    """The user's model, data, options or paths cannot be used as given. Nothing was written."""

    status = 2


class InvalidModel(EffcError):
    """A model breaks a rule of `effc.verify`; after a pass this is the pass's fault, not the user's."""


class PassFailed(EffcError):
    """A pass could not do what it said. The caller's model is untouched."""


class RequirementNotMet(EffcError):
    """A stated requirement (`min_speedup`, `max_size`) was not reached; `result` holds the best that was."""

    status = 3

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result
