"""The profile of λ as a picture, for TensorBoard, Weights & Biases and Trackio: at the switch and at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..activation.module import hardness_profile
from ..measurement.plots import hardness_figure

if TYPE_CHECKING:
    from .trainer import LambdaGELUTrainer

logger = logging.get_logger(__name__)

TAG = "hardness/profile"
_LOGGERS = (TensorBoardCallback, WandbCallback, TrackioCallback)
_END = "train_runtime"  # in the last log of a run, before the loggers are closed


class ProfilePictures(TrainerCallback):
    """Hands a picture of λ per site, and of λ and the ReLU gap over the steps, to the loggers of a trainer.

    Without matplotlib, or where a logger fails, the run goes on with the scalars alone.
    """

    def __init__(self, trainer: LambdaGELUTrainer) -> None:
        self.trainer = trainer
        self._switched = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._switched = self.trainer.has_switched

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._switched and self.trainer.has_switched:
            self._switched = True
            self._show(state, self.trainer.learned_hardness, f"λ as learned, at the switch (step {state.global_step})")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and _END in logs:
            profile = hardness_profile(kwargs["model"])
            if profile:
                self._show(state, profile, f"λ at the end (step {state.global_step})")

    def _show(self, state: Any, profile: Mapping[str, float], title: str) -> None:
        if not state.is_world_process_zero:
            return
        loggers = [each for each in self.trainer.callback_handler.callbacks if isinstance(each, _LOGGERS)]
        try:
            pixels = _pixels(hardness_figure(profile, state.log_history, title)) if loggers else None
        except ImportError as error:
            logger.info(f"the profile of λ is not shown: {error}")
            return
        for each in loggers:
            try:
                _send(each, pixels, title, state.global_step)
            except Exception as error:  # a picture is not worth a run
                logger.warning(f"{type(each).__name__} did not take the picture of λ: {error!r}")


def _pixels(figure: Any) -> Any:
    """(height, width, 3), uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _send(callback: Any, pixels: Any, title: str, step: int) -> None:
    if isinstance(callback, TensorBoardCallback):
        if callback.tb_writer is not None:
            callback.tb_writer.add_image(TAG, pixels, step, dataformats="HWC")
            callback.tb_writer.flush()
    elif isinstance(callback, WandbCallback):
        if callback._wandb is not None and callback._wandb.run is not None:
            image = callback._wandb.Image(pixels, caption=title)
            callback._wandb.log({TAG: image, "train/global_step": step})
    elif callback._initialized:
        callback._trackio.log({TAG: callback._trackio.Image(pixels, caption=title), "train/global_step": step})
