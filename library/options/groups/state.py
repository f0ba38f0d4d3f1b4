"""Options about saving the state of a run and continuing it."""

from typing import ClassVar

from library.options.declare import OptionGroup, PathText, flag, option


class StateFileOptions(OptionGroup):
    """Saving and resuming."""

    topic: ClassVar[str] = "State and resume"

    save_state: bool = flag("Save the state of the run whenever a model is saved, and at the end.")
    save_state_on_train_end: bool = flag("Save the state of the run at the end only.")
    resume: PathText = option(None, "Folder of a saved state to continue from, exactly.")


class StateOptions(StateFileOptions):
    """Saving, resuming and starting late."""

    resume_changed: bool = flag("Resume although the data, or options that decide the numbers, changed since the state was saved.")
    initial_epoch: int | None = option(None, "Epoch to start from, counted from 1.", ge=1)
    initial_step: int | None = option(None, "Step to start from, counted from 0; wins over --initial_epoch.", ge=0)
    skip_until_initial_step: bool = flag("Skip the data before the initial step instead of starting the data anew.")
