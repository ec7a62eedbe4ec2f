"""GROOVE: LPG's meta-gradients on levels that are kept and played again for their algorithmic regret (Jackson et al. 2023)."""

import dataclasses

from pgjax.experiments.meta_train import lpg
from pgjax.experiments.meta_train.levels import Score

build = lpg.build


@dataclasses.dataclass
class Args(lpg.Args):
    """Learn an update rule for policy gradients on a curriculum of levels."""

    score: Score = "alg_regret"
    """What a level is worth to be played again; random: all are fresh, plain LPG; frozen: a buffer that never changes."""
