"""The libraries below the commands, kept from talking over them.

Called by a command's body just before it imports `less`: only what somebody has to wait for is shown, and that
is a download.
"""

__all__ = ["hush_libraries"]


def hush_libraries(quiet: bool) -> None:
    """No bars of transformers for loading and saving; the hub's bars for downloads stay, but for `quiet`."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = not (quiet or are_progress_bars_disabled())
    logging.disable_progress_bar()  # turns off the hub's too
    if downloads:
        enable_progress_bars()
