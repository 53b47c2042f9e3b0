"""Everything that can go wrong in the engine, and the exit code each fault ends the process with.

EngineError
├── InvalidConfig          64  the settings cannot work together
├── ModelLoadFailed        64  the base model cannot be loaded
├── InvalidTrainingFile    65  a data row is not what it should be
├── RewardUnavailable      69  the reward service cannot be reached
├── RewardFailed           70  the reward raised, or answered with something that is no number
├── NonfiniteLoss          70  loss or gradient stayed infinite or NaN
├── SelfCheckFailed        70  something is wrong with the run before it has learned anything
├── GuardAbort             70  a guard was told to end the run
├── OutOfMemory            71  the device has too little memory for the job
└── DiskFull               74  a file could not be written
"""


class EngineError(Exception):
    """The engine cannot go on."""

    code = "internal_error"
    exit_code = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.param))


def _rebuild(kind: type[EngineError], message: str, param: str | None) -> EngineError:
    """The error again, on the other side of a pickle."""
    return kind(message, param=param)


class InvalidConfig(EngineError):
    """The settings cannot work, alone or together."""

    code = "invalid_config"
    exit_code = 64


class ModelLoadFailed(EngineError):
    """The base model's files cannot be loaded, or are of a kind that cannot be trained."""

    code = "model_load_failed"
    exit_code = 64


class InvalidTrainingFile(EngineError):
    """A row of the training or validation file cannot be used."""

    code = "invalid_training_file"
    exit_code = 65


class RewardUnavailable(EngineError):
    """The reward service cannot be reached; trying again later may help."""

    code = "reward_unavailable"
    exit_code = 69


class RewardFailed(EngineError):
    """The reward raised, or returned something other than one finite number per answer."""

    code = "reward_failed"
    exit_code = 70


class NonfiniteLoss(EngineError):
    """Loss or gradient stayed infinite or not-a-number for several passes in a row."""

    code = "nonfinite_loss"
    exit_code = 70


class SelfCheckFailed(EngineError):
    """Before any training the policy, its reference or its gradients are not what they must be."""

    code = "self_check_failed"
    exit_code = 70


class GuardAbort(EngineError):
    """A guard with the action `abort` fired."""

    code = "guard_abort"
    exit_code = 70


class OutOfMemory(EngineError):
    """The device has too little memory for this job."""

    code = "out_of_memory"
    exit_code = 71


class DiskFull(EngineError):
    """A file could not be written because the disk or a quota is full."""

    code = "disk_full"
    exit_code = 74


STOPPED_EXIT_CODE = 75
"""Stopped on request; after a pause the state is saved."""
