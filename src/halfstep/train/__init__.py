"""Train networks over latents: one loop, in any precision, over processes, with exact resume."""

from halfstep.train.config import TrainConfig
from halfstep.train.loop import TrainReport, train
from halfstep.verbs import make_callable

__all__ = ["TrainConfig", "TrainReport", "train"]

make_callable(__name__)
