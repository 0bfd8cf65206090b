"""Measurements that anyone can repeat on their own machine and model: `quire bench ...`."""
