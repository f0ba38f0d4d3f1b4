"""Options about logs and trackers."""

from pathlib import Path
from typing import ClassVar, Literal

from library.options.declare import OptionGroup, PathText, SecretText, flag, option


class LoggingOptions(OptionGroup):
    """Where losses and rates are logged."""

    topic: ClassVar[str] = "Logging and trackers"

    logging_dir: PathText = option(None, "Folder for logs; each run makes a sub-folder named by prefix and time.")
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, "Tracker; tensorboard when left out and --logging_dir is given."
    )
    log_prefix: str | None = option(None, "Text before the time in the name of the run's folder.")
    log_tracker_name: str | None = option(None, "Name of the tracker or project; network_train when left out.")
    log_tracker_config: PathText = option(None, "TOML file with arguments of the tracker.")
    wandb_run_name: str | None = option(None, "Name of the run on wandb.")
    wandb_api_key: SecretText = option(None, "Key to log in to wandb with.")
    log_events: Path | None = option(None, "Append what happens to this file, one JSON object per line, for programs that watch.")
    loss_ledger: bool = flag("Keep the loss of every image, compared with others at the same timesteps, in NAME-losses.csv.")
    log_grad_norm: bool = flag("Log the norm of each part's gradient, as it is before --max_grad_norm limits it.")
    log_config: bool = flag("Store the options of the run with the tracker, without keys, tokens and paths.")
