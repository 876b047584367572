"""The progress bar of `Agent.learn`."""

from __future__ import annotations

from stable_baselines3.common.callbacks import ProgressBarCallback


class SampleProgressBar(ProgressBarCallback):
    """The progress bar over environment steps of all rows that an agent samples, forks included."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._shown = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.model.num_timesteps - self._shown)
        self._shown = self.model.num_timesteps
        return True
