"""Methods that learn at every environment step: from a replay buffer, or from one transition at a time."""
