"""Probes of frozen features: encoding, the feature cache, the heads, k-NN."""
