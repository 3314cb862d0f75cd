"""MusicGen: text in, logits over codes out."""
