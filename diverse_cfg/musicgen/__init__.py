"""The only folder that knows MusicGen: `policy` (load, encode text, logits over codes), `rollout` (sample clips)."""
