"""Sampling: the decoder loop, its fused weights, batches that fit, and clips out (`rollout`)."""
