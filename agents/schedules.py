"""Learning-rate schedules, whose home is ``common/schedules.py``."""

from agents.common.schedules import SCHEDULES, WarmupCosine, WarmupLinear, make_schedule

__all__ = ["SCHEDULES", "WarmupCosine", "WarmupLinear", "make_schedule"]
