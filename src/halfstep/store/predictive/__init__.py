"""The predictive codec for sampling trajectories: a bounded error in a small part of half precision's bytes.

A sampler's latents move smoothly, so a state is nearly a linear combination of a few others of its run. Each is
predicted from states as they will be *decoded* (closed loop: errors do not add up), with least-squares weights a
channel; what is left is rounded to bins as wide as the promise allows, and the integers are entropy-coded by pcodec.
States of a group are coded from its ends to its middles; a group refers to the last states of the one before.
"""

from halfstep.store.predictive.blob import (
    GROUP,
    Accuracy,
    count_states,
    decode_states,
    decode_trajectory,
    encode_trajectory,
    first_groups,
)
from halfstep.store.predictive.noise import Noise
from halfstep.store.predictive.prediction import Float32
from halfstep.store.predictive.promise import Fidelity, Promise

__all__ = [
    "GROUP",
    "Accuracy",
    "Fidelity",
    "Float32",
    "Noise",
    "Promise",
    "count_states",
    "decode_states",
    "decode_trajectory",
    "encode_trajectory",
    "first_groups",
]
