"""What an environment and a drift function promise, measured."""
