"""Precision plans: how many bits each layer's keys and values get, by rule or by measurement."""
