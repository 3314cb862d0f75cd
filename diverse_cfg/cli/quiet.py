"""Keep other libraries' notices off the terminal of commands that draw their own progress."""

import logging


def quiet_libraries() -> None:
    """No bars for loading a few megabytes of weights, no remarks about cards that are only being written."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    logging.getLogger("diverse_cfg.merging").setLevel(logging.WARNING)  # merges in temporary folders
