"""Learned objectives and update rules: their files, the rule's network, and the evolution that finds them."""
